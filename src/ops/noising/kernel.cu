// Noising: the noisy latents, repeated along the batch, and the target in one pass. LATENT, NOISE: dtypes.

constexpr u32 N = pack_of(sizeof(LATENT), sizeof(NOISE));
constexpr u32 UNROLL = 2;
constexpr u32 CHUNK = THREADS * UNROLL * N;

struct Noising {
    // x and n, [batch, row]
    const LATENT* latents;
    const NOISE* noise;
    // Factors of x and n in z, [batch]
    const REAL* signal;
    const REAL* sigma;
    // z, [copies, batch, row]
    LATENT* noisy;
    // [batch, row], or null where it is the noise itself
    NOISE* target;
    u64 copies;
    u64 batch;
    u64 row;
    // The target is n - x, else signal * n - sigma * x.
    u64 flow;
};

struct Rates {
    REAL signal;
    REAL sigma;
    REAL target_signal;
    REAL target_sigma;
};

template <u32 K>
__device__ inline void write(const Noising& work, const Rates& rates, u64 at, const Pack<LATENT, K>& x,
                             const Pack<NOISE, K>& n) {
    Pack<LATENT, K> noisy;
    Pack<NOISE, K> target;
#pragma unroll
    for (u32 i = 0; i < K; ++i) {
        const REAL latent = widen<REAL>(x.values[i]), noise = widen<REAL>(n.values[i]);
        narrow(rates.signal * latent + rates.sigma * noise, noisy.values[i]);
        narrow(rates.target_signal * latent + rates.target_sigma * noise, target.values[i]);
    }
    for (u64 copy = 0; copy < work.copies; ++copy) {
        store<K>(work.noisy + copy * work.batch * work.row + at, noisy);
    }
    if (work.target) store<K>(work.target + at, target);
}

// Blocks: any number.
extern "C" __global__ void __launch_bounds__(THREADS) noising(const Noising work) {
    const u64 chunks_per_row = (work.row + CHUNK - 1) / CHUNK, chunks = work.batch * chunks_per_row;
    for (u64 chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
        const u64 sample = chunk / chunks_per_row, start = chunk % chunks_per_row * CHUNK;
        const u64 offset = sample * work.row + start;
        const u32 len = u32(work.row - start < CHUNK ? work.row - start : CHUNK);
        const LATENT* latents = work.latents + offset;
        const NOISE* noise = work.noise + offset;
        Rates rates;
        rates.signal = work.signal[sample];
        rates.sigma = work.sigma[sample];
        rates.target_signal = work.flow ? REAL(-1) : -rates.sigma;
        rates.target_sigma = work.flow ? REAL(1) : rates.signal;

        // Copies are aligned alike where one has a whole number of packs.
        Cut<u32> parts = cut<N>(len, latents, noise, work.noisy + offset, work.target ? work.target + offset : nullptr);
        if (work.copies > 1 && work.batch * work.row % N != 0) parts = {0, 0, len};
        Pack<LATENT, N> xs[UNROLL];
        Pack<NOISE, N> ns[UNROLL];
#pragma unroll
        for (u32 u = 0; u < UNROLL; ++u) {
            const u32 pack = u * THREADS + threadIdx.x, at = parts.head + pack * N;
            if (pack < parts.packs) {
                xs[u] = load<N>(latents + at);
                ns[u] = load<N>(noise + at);
            }
        }
#pragma unroll
        for (u32 u = 0; u < UNROLL; ++u) {
            const u32 pack = u * THREADS + threadIdx.x;
            if (pack < parts.packs) write(work, rates, offset + parts.head + pack * N, xs[u], ns[u]);
        }
        for (u32 i = threadIdx.x; i < parts.singles; i += THREADS) {
            const u32 at = parts.single<N>(i);
            write(work, rates, offset + at, load<1>(latents + at), load<1>(noise + at));
        }
    }
}
