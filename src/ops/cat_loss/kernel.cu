// The CAT loss: values and gradients in one pass. PRED, TARGET: dtypes of the predictions and of what they are
// compared with.

constexpr u32 N = pack_of(sizeof(PRED), sizeof(TARGET));
// Packs of each tensor that a thread has under way.
constexpr u32 UNROLL = 4;
constexpr u32 CHUNK = THREADS * UNROLL * N;

// mean_i w_i * mean_x m * (pred - target)^2
struct Term {
    const PRED* pred;
    const TARGET* target;
    // null where nobody wants the gradient
    PRED* grad;
    u64 is_cat;
    // w, [batch], or null
    const REAL* weights;
    // m, rows of `row` elements: one, or one a sample; or null
    const REAL* mask;
    // The sums of the mask's rows, to divide by; or null
    const f64* mask_sums;
    // 1 / (batch * elements of a sample)
    f64 share;
    u64 batch;
    // A sample is `rows_per_sample` rows, over which the mask repeats.
    u64 rows_per_sample;
    u64 row;
    u64 mask_per_sample;
};

struct CatLoss {
    Term terms[2];
    // [terms, blocks]
    f64* partials;
    Scalar cat_factor;
    // The gradient's factor.
    Scalar scale;
};

// w_i / (B * denominator_i): what turns a sample's sum of squares into its share of the term.
__device__ inline f64 sample_scale(const Term& term, u64 sample) {
    const f64 weight = term.weights ? f64(term.weights[sample]) : 1.0;
    if (term.mask_sums == nullptr) return weight * term.share;
    const f64 mask_mean = term.mask_sums[term.mask_per_sample ? sample : 0] / f64(term.row);
    // A sample that is masked out whole has nothing to learn from: it counts as zero.
    return mask_mean == 0.0 ? 0.0 : weight * term.share / mask_mean;
}

// Adds m * (pred - target)^2 to the sum and leaves the gradient.
template <u32 K>
__device__ inline void errors(const Pack<PRED, K>& pred, const Pack<TARGET, K>& target, const Pack<REAL, K>& mask,
                              REAL scale, Pack<PRED, K>& grad, REAL& sum) {
#pragma unroll
    for (u32 i = 0; i < K; ++i) {
        const REAL error = widen<REAL>(pred.values[i]) - widen<REAL>(target.values[i]);
        const REAL masked = mask.values[i] * error;
        sum += masked * error;
        narrow(scale * masked, grad.values[i]);
    }
}

template <u32 K>
__device__ inline Pack<REAL, K> mask_pack(const REAL* mask, u32 at) {
    if (mask) return load<K>(mask + at);
    Pack<REAL, K> ones;
#pragma unroll
    for (u32 i = 0; i < K; ++i) ones.values[i] = REAL(1);
    return ones;
}

// The sum over up to CHUNK elements of one row; writes their gradients.
__device__ inline REAL chunk_sum(const PRED* pred, const TARGET* target, const REAL* mask, PRED* grad, u32 len,
                                 REAL scale) {
    const Cut<u32> parts = cut<N>(len, pred, target, mask, grad);
    REAL sum = 0;
    Pack<PRED, N> preds[UNROLL];
    Pack<TARGET, N> targets[UNROLL];
#pragma unroll
    for (u32 u = 0; u < UNROLL; ++u) {
        const u32 pack = u * THREADS + threadIdx.x, at = parts.head + pack * N;
        if (pack < parts.packs) {
            preds[u] = load<N>(pred + at);
            targets[u] = load<N>(target + at);
        }
    }
#pragma unroll
    for (u32 u = 0; u < UNROLL; ++u) {
        const u32 pack = u * THREADS + threadIdx.x, at = parts.head + pack * N;
        if (pack < parts.packs) {
            Pack<PRED, N> out;
            errors(preds[u], targets[u], mask_pack<N>(mask, at), scale, out, sum);
            if (grad) store<N>(grad + at, out);
        }
    }
    for (u32 i = threadIdx.x; i < parts.singles; i += THREADS) {
        const u32 at = parts.single<N>(i);
        Pack<PRED, 1> out;
        errors(load<1>(pred + at), load<1>(target + at), mask_pack<1>(mask, at), scale, out, sum);
        if (grad) grad[at] = out.values[0];
    }
    return sum;
}

// Blocks: any number, for each of the terms.
extern "C" __global__ void __launch_bounds__(THREADS) cat_loss(const CatLoss loss) {
    const Term term = blockIdx.y ? loss.terms[1] : loss.terms[0];
    const f64 factor = 2.0 * (term.is_cat ? loss.cat_factor.get() : 1.0) * loss.scale.get();
    const u64 chunks_per_row = (term.row + CHUNK - 1) / CHUNK;
    const u64 chunks = term.batch * term.rows_per_sample * chunks_per_row;
    f64 sum = 0.0;
    for (u64 chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
        const u64 row = chunk / chunks_per_row, start = chunk % chunks_per_row * CHUNK;
        const u64 sample = row / term.rows_per_sample, offset = row * term.row + start;
        const u32 len = u32(term.row - start < CHUNK ? term.row - start : CHUNK);
        const REAL* mask = term.mask ? term.mask + (term.mask_per_sample ? sample * term.row : 0) + start : nullptr;
        const f64 scale = sample_scale(term, sample);
        sum += scale * f64(chunk_sum(term.pred + offset, term.target + offset, mask,
                                     term.grad ? term.grad + offset : nullptr, len, REAL(factor * scale)));
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) loss.partials[u64(blockIdx.y) * gridDim.x + blockIdx.x] = sum;
}

struct Values {
    // Those of the diffusion term, then those of the preservation term.
    const f64* partials;
    u64 diffusion_count;
    u64 cat_count;
    Scalar cat_factor;
    REAL* total;
    // diffusion, cat
    REAL* parts;
};

// One block.
extern "C" __global__ void __launch_bounds__(THREADS) cat_loss_values(const Values values) {
    const f64 diffusion = array_sum(values.partials, values.diffusion_count);
    const f64 cat = array_sum(values.partials + values.diffusion_count, values.cat_count);
    if (threadIdx.x == 0) {
        *values.total = REAL(diffusion + values.cat_factor.get() * cat);
        values.parts[0] = REAL(diffusion);
        values.parts[1] = REAL(cat);
    }
}

struct MaskSums {
    const REAL* mask;
    f64* sums;
    u64 row;
};

// One block for each of the mask's rows.
extern "C" __global__ void __launch_bounds__(THREADS) mask_sums(const MaskSums work) {
    const REAL* mask = work.mask + blockIdx.x * work.row;
    f64 sum = 0.0;
    for (u64 i = threadIdx.x; i < work.row; i += THREADS) sum += f64(mask[i]);
    sum = block_sum(sum);
    if (threadIdx.x == 0) work.sums[blockIdx.x] = sum;
}

struct Scaling {
    // Gradients of PRED; null where there is none
    PRED* grads[2];
    u64 len;
    Scalar factor;
};

// Multiplies gradients in place. A factor of 1, which most have, costs no more than the launch.
extern "C" __global__ void __launch_bounds__(THREADS) scale_gradients(const Scaling work) {
    PRED* grad = blockIdx.y ? work.grads[1] : work.grads[0];
    const REAL factor = REAL(work.factor.get());
    if (factor == REAL(1) || grad == nullptr) return;
    constexpr u32 M = pack_of(sizeof(PRED));
    const Cut<u64> parts = cut<M>(work.len, grad);
    const u64 first = u64(blockIdx.x) * THREADS + threadIdx.x;
    for (u64 i = first; i < parts.packs; i += u64(gridDim.x) * THREADS) {
        PRED* at = grad + parts.head + i * M;
        Pack<PRED, M> pack = load<M>(at);
#pragma unroll
        for (u32 k = 0; k < M; ++k) narrow(factor * widen<REAL>(pack.values[k]), pack.values[k]);
        store<M>(at, pack);
    }
    if (first < parts.singles) {
        PRED* at = grad + parts.single<M>(first);
        narrow(factor * widen<REAL>(*at), *at);
    }
}
