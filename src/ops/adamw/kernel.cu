// AdamW over flat buffers. REAL: of weights and moments; GRAD: of the gradients; LOW: of the low-precision copy.

constexpr u32 N = pack_of(sizeof(REAL), sizeof(GRAD), sizeof(LOW));

struct Squares {
    const GRAD* grad;
    u64 len;
    // [blocks]
    f64* partials;
};

// Blocks: any number.
extern "C" __global__ void __launch_bounds__(THREADS) squares(const Squares work) {
    constexpr u32 M = pack_of(sizeof(GRAD)), UNROLL = 8, CHUNK = THREADS * UNROLL * M;
    f64 sum = 0.0;
    for (u64 start = u64(blockIdx.x) * CHUNK; start < work.len; start += u64(gridDim.x) * CHUNK) {
        const GRAD* grad = work.grad + start;
        const u32 len = u32(work.len - start < CHUNK ? work.len - start : CHUNK);
        const Cut<u32> parts = cut<M>(len, grad);
        Pack<GRAD, M> packs[UNROLL];
#pragma unroll
        for (u32 u = 0; u < UNROLL; ++u) {
            const u32 pack = u * THREADS + threadIdx.x;
            if (pack < parts.packs) packs[u] = load<M>(grad + parts.head + pack * M);
        }
        REAL squares = 0;
#pragma unroll
        for (u32 u = 0; u < UNROLL; ++u) {
            if (u * THREADS + threadIdx.x < parts.packs) {
#pragma unroll
                for (u32 i = 0; i < M; ++i) {
                    const REAL value = widen<REAL>(packs[u].values[i]);
                    squares += value * value;
                }
            }
        }
        if (threadIdx.x < parts.singles) {
            const REAL value = widen<REAL>(grad[parts.single<M>(threadIdx.x)]);
            squares += value * value;
        }
        sum += f64(squares);
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) work.partials[blockIdx.x] = sum;
}

struct Sum {
    const f64* partials;
    u64 count;
    f64* sum;
};

// One block.
extern "C" __global__ void __launch_bounds__(THREADS) sum_partials(const Sum work) {
    const f64 sum = array_sum(work.partials, work.count);
    if (threadIdx.x == 0) *work.sum = sum;
}

// The numbers of one step.
struct Step {
    // Of clipping.
    REAL grad_scale;
    // 1 - lr * weight_decay
    REAL decay;
    // 1 - beta1
    REAL new1;
    REAL beta2;
    // 1 - beta2
    REAL new2;
    // lr / (1 - beta1^t)
    REAL step_size;
    // 1 / sqrt(1 - beta2^t)
    REAL correction;
    REAL eps;
    // Not 0 where the gradient's norm is not finite.
    REAL skip;
};

struct Prepare {
    // lr, beta1, beta2, eps, weight_decay, max_grad_norm
    Scalar settings;
    // Sums of squares of all gradients.
    const f64* sums;
    u64 sum_count;
    // Steps taken.
    f32* count;
    // Steps skipped, or null
    long long* skipped;
    Step* step;
};

// One block, of which one thread works.
extern "C" __global__ void __launch_bounds__(THREADS) prepare(const Prepare work) {
    if (threadIdx.x != 0) return;
    f64 settings[6];
    for (u32 i = 0; i < 6; ++i) {
        Scalar setting = work.settings;
        setting.at = static_cast<const char*>(setting.at) + i * (setting.is_f64 ? sizeof(f64) : sizeof(f32));
        settings[i] = setting.get();
    }
    const f64 lr = settings[0], beta1 = settings[1], beta2 = settings[2], limit = settings[5];
    f64 sum = 0.0;
    for (u64 i = 0; i < work.sum_count; ++i) sum += work.sums[i];
    const f64 norm = sqrt(sum);
    // Comparisons with a NaN are false.
    const bool finite = norm < __longlong_as_double(0x7ff0000000000000ll);
    const f64 t = f64(*work.count) + 1.0;
    // As clip_grad_norm_: the 1e-6 keeps a zero norm from dividing.
    const f64 clip = limit / (norm + 1e-6);
    Step step;
    step.grad_scale = REAL(clip < 1.0 ? clip : 1.0);
    step.decay = REAL(1.0 - lr * settings[4]);
    step.new1 = REAL(1.0 - beta1);
    step.beta2 = REAL(beta2);
    step.new2 = REAL(1.0 - beta2);
    step.step_size = REAL(lr / (1.0 - pow(beta1, t)));
    step.correction = REAL(1.0 / sqrt(1.0 - pow(beta2, t)));
    step.eps = REAL(settings[3]);
    step.skip = finite ? REAL(0) : REAL(1);
    *work.step = step;
    if (finite) {
        *work.count = f32(t);
    } else if (work.skipped) {
        *work.skipped += 1;
    }
}

struct Update {
    REAL* param;
    GRAD* grad;
    REAL* exp_avg;
    REAL* exp_avg_sq;
    // The weights again, or null
    LOW* low_precision;
    const Step* step;
    u64 len;
};

template <u32 K>
__device__ inline void update(const Step& step, const Pack<GRAD, K>& grads, Pack<REAL, K>& param, Pack<REAL, K>& exp_avg,
                              Pack<REAL, K>& exp_avg_sq, Pack<LOW, K>& low_precision) {
#pragma unroll
    for (u32 i = 0; i < K; ++i) {
        const REAL grad = widen<REAL>(grads.values[i]) * step.grad_scale;
        const REAL m = exp_avg.values[i] + step.new1 * (grad - exp_avg.values[i]);
        const REAL v = step.beta2 * exp_avg_sq.values[i] + step.new2 * grad * grad;
        exp_avg.values[i] = m;
        exp_avg_sq.values[i] = v;
        param.values[i] = param.values[i] * step.decay - step.step_size * m / (sqrt(v) * step.correction + step.eps);
        narrow(param.values[i], low_precision.values[i]);
    }
}

// Blocks: any number. The gradients are zero afterwards.
extern "C" __global__ void __launch_bounds__(THREADS) adamw(const Update work) {
    constexpr u32 UNROLL = 2, CHUNK = THREADS * UNROLL * N;
    const Step step = *work.step;
    Pack<GRAD, N> zeros;
#pragma unroll
    for (u32 i = 0; i < N; ++i) narrow(REAL(0), zeros.values[i]);
    for (u64 start = u64(blockIdx.x) * CHUNK; start < work.len; start += u64(gridDim.x) * CHUNK) {
        REAL* param = work.param + start;
        GRAD* grad = work.grad + start;
        REAL* exp_avg = work.exp_avg + start;
        REAL* exp_avg_sq = work.exp_avg_sq + start;
        LOW* low_precision = work.low_precision ? work.low_precision + start : nullptr;
        const u32 len = u32(work.len - start < CHUNK ? work.len - start : CHUNK);
        const Cut<u32> parts = cut<N>(len, param, grad, exp_avg, exp_avg_sq, low_precision);
        if (step.skip != REAL(0)) {
            for (u32 pack = threadIdx.x; pack < parts.packs; pack += THREADS) {
                store<N>(grad + parts.head + pack * N, zeros);
            }
            for (u32 i = threadIdx.x; i < parts.singles; i += THREADS) grad[parts.single<N>(i)] = zeros.values[0];
            continue;
        }
        Pack<REAL, N> params[UNROLL], ms[UNROLL], vs[UNROLL];
        Pack<GRAD, N> grads[UNROLL];
#pragma unroll
        for (u32 u = 0; u < UNROLL; ++u) {
            const u32 pack = u * THREADS + threadIdx.x, at = parts.head + pack * N;
            if (pack < parts.packs) {
                grads[u] = load<N>(grad + at);
                params[u] = load<N>(param + at);
                ms[u] = load<N>(exp_avg + at);
                vs[u] = load<N>(exp_avg_sq + at);
            }
        }
#pragma unroll
        for (u32 u = 0; u < UNROLL; ++u) {
            const u32 pack = u * THREADS + threadIdx.x, at = parts.head + pack * N;
            if (pack < parts.packs) {
                Pack<LOW, N> low;
                update(step, grads[u], params[u], ms[u], vs[u], low);
                store<N>(param + at, params[u]);
                store<N>(exp_avg + at, ms[u]);
                store<N>(exp_avg_sq + at, vs[u]);
                store<N>(grad + at, zeros);
                if (low_precision) store<N>(low_precision + at, low);
            }
        }
        for (u32 i = threadIdx.x; i < parts.singles; i += THREADS) {
            const u32 at = parts.single<N>(i);
            Pack<REAL, 1> one = load<1>(param + at), m = load<1>(exp_avg + at), v = load<1>(exp_avg_sq + at);
            Pack<LOW, 1> low;
            update(step, load<1>(grad + at), one, m, v, low);
            store<1>(param + at, one);
            store<1>(exp_avg + at, m);
            store<1>(exp_avg_sq + at, v);
            grad[at] = zeros.values[0];
            if (low_precision) store<1>(low_precision + at, low);
        }
    }
}
