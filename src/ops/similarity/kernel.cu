// Similarities of embeddings: s(a, b) = (1 + cos(a, b)) / 2. EMBEDDING_A, EMBEDDING_B:
// dtypes of the embeddings.

using A = EMBEDDING_A;
using B = EMBEDDING_B;
constexpr u32 N = pack_of(sizeof(A), sizeof(B));

// A sum of squares; NaN where it may have lost digits to the range of REAL, or a row has no direction.
__device__ inline f64 in_range(f64 square) {
    const f64 infinity = __longlong_as_double(0x7ff0000000000000ll);
    const f64 least = sizeof(REAL) == sizeof(f32) ? 1e-30 : 0.0;
    return square > least && square < infinity ? square : infinity - infinity;
}

// (1 + cos) / 2 from a.b and |a|^2 |b|^2; rounding can leave [0, 1] by a hair.
__device__ inline f64 score(f64 product, f64 squared_norms) {
    const f64 value = 0.5 + 0.5 * (product / sqrt(squared_norms));
    return value < 0.0 ? 0.0 : value > 1.0 ? 1.0 : value;
}

struct Products {
    f64 aa;
    f64 bb;
    f64 ab;
};

template <u32 K>
__device__ inline void multiply(const Pack<A, K>& a, const Pack<B, K>& b, REAL sums[3]) {
#pragma unroll
    for (u32 i = 0; i < K; ++i) {
        const REAL x = widen<REAL>(a.values[i]), y = widen<REAL>(b.values[i]);
        sums[0] += x * x;
        sums[1] += y * y;
        sums[2] += x * y;
    }
}

// A thread's share of the products of two rows: REAL over a few packs, f64 over the row.
__device__ inline Products row_products(const A* a, const B* b, u64 dim, u32 thread, u32 threads) {
    constexpr u32 UNROLL = 4;
    const Cut<u64> parts = cut<N>(dim, a, b);
    Products products = {0.0, 0.0, 0.0};
    for (u64 first = thread; first < parts.packs; first += UNROLL * threads) {
        Pack<A, N> as[UNROLL];
        Pack<B, N> bs[UNROLL];
#pragma unroll
        for (u32 u = 0; u < UNROLL; ++u) {
            const u64 pack = first + u * threads;
            if (pack < parts.packs) {
                as[u] = load<N>(a + parts.head + pack * N);
                bs[u] = load<N>(b + parts.head + pack * N);
            }
        }
        REAL sums[3] = {0, 0, 0};
#pragma unroll
        for (u32 u = 0; u < UNROLL; ++u) {
            if (first + u * threads < parts.packs) multiply(as[u], bs[u], sums);
        }
        products.aa += f64(sums[0]);
        products.bb += f64(sums[1]);
        products.ab += f64(sums[2]);
    }
    for (u64 i = thread; i < parts.singles; i += threads) {
        const u64 at = parts.single<N>(i);
        REAL sums[3] = {0, 0, 0};
        multiply(load<1>(a + at), load<1>(b + at), sums);
        products.aa += f64(sums[0]);
        products.bb += f64(sums[1]);
        products.ab += f64(sums[2]);
    }
    return products;
}

struct Paired {
    const A* a;
    const B* b;
    f64* values;
    u64 rows;
    u64 dim;
    // Elements from a row of b to the next; 0 compares all rows of a with one.
    u64 b_stride;
    // The threads of a block work on one row together, else those of a warp.
    u64 block_per_row;
    // 0: (1 + cos) / 2; 1: the same with |b| taken to be 1; 2: |a|. NaN as in_range has it.
    u64 result;
};

// Blocks: any number.
extern "C" __global__ void __launch_bounds__(THREADS) paired(const Paired work) {
    const u32 threads = work.block_per_row ? THREADS : WARP, thread = threadIdx.x % threads;
    const u64 rows_per_block = THREADS / threads;
    for (u64 row = blockIdx.x * rows_per_block + threadIdx.x / threads; row < work.rows;
         row += gridDim.x * rows_per_block) {
        Products sums = row_products(work.a + row * work.dim, work.b + row * work.b_stride, work.dim, thread, threads);
        if (work.block_per_row) {
            sums.aa = block_sum(sums.aa);
            sums.bb = block_sum(sums.bb);
            sums.ab = block_sum(sums.ab);
        } else {
            sums.aa = warp_sum(sums.aa);
            sums.bb = warp_sum(sums.bb);
            sums.ab = warp_sum(sums.ab);
        }
        if (thread == 0) {
            const f64 aa = in_range(sums.aa);
            work.values[row] = work.result == 2   ? sqrt(aa)
                               : work.result == 1 ? score(sums.ab, aa)
                                                  : score(sums.ab, aa * in_range(sums.bb));
        }
    }
}

struct DirectionMean {
    const B* b;
    // |b_j|
    const f64* norms;
    // [blocks, dim]
    f64* partials;
    u64 rows;
    u64 dim;
};

// Shares of the mean of the rows b_j / |b_j|. Blocks: [any number, those that cover the columns by THREADS].
extern "C" __global__ void __launch_bounds__(THREADS) direction_mean(const DirectionMean work) {
    const u64 column = u64(blockIdx.y) * THREADS + threadIdx.x;
    if (column >= work.dim) return;
    f64 sum = 0.0;
    for (u64 row = blockIdx.x; row < work.rows; row += gridDim.x) {
        sum += widen<f64>(work.b[row * work.dim + column]) / (work.norms[row] * f64(work.rows));
    }
    work.partials[blockIdx.x * work.dim + column] = sum;
}

struct SumRows {
    const f64* partials;
    REAL* sums;
    u64 rows;
    u64 dim;
};

// Blocks: those that cover the columns by THREADS.
extern "C" __global__ void __launch_bounds__(THREADS) sum_rows(const SumRows work) {
    const u64 column = u64(blockIdx.x) * THREADS + threadIdx.x;
    if (column >= work.dim) return;
    f64 sum = 0.0;
    for (u64 row = 0; row < work.rows; ++row) sum += work.partials[row * work.dim + column];
    work.sums[column] = REAL(sum);
}

struct CrossMax {
    const A* a;
    const B* b;
    const f64* a_norms;
    const f64* b_norms;
    // [splits, a_rows]
    f64* best;
    u64 a_rows;
    u64 b_rows;
    u64 dim;
};

// A block compares TILE rows of a with its share of the rows of b, TILE at a time; a thread, OWN by OWN pairs.
//
// Consumer cards have 1/64 of their arithmetic in float64, so that none is used for each pair. REAL sums DEPTH products,
// then FOLD of these sums, and Sum, which is as good as twice the precision, the rest. With u = 2^-24 in float32 a
// cosine is off by at most (DEPTH + FOLD + 6) u.
constexpr u32 TILE = 64, DEPTH = 16, OWN = 4, SIDE = TILE / OWN, FOLD = 8;

// A sum, and what rounding took from it.
struct Sum {
    REAL high;
    REAL low;
    __device__ void add(REAL value) {
        const REAL sum = high + value, added = sum - high;
        low += (high - (sum - added)) + (value - added);
        high = sum;
    }
};

template <class T>
__device__ inline void load_tile(REAL (&tile)[DEPTH][TILE + 1], const T* rows, u64 first, u64 count, u64 start, u64 dim) {
    for (u32 i = threadIdx.x; i < TILE * DEPTH; i += THREADS) {
        const u32 row = i / DEPTH, depth = i % DEPTH;
        const bool inside = first + row < count && start + depth < dim;
        tile[depth][row] = inside ? widen<REAL>(rows[(first + row) * dim + start + depth]) : REAL(0);
    }
}

// Blocks: [those that cover the rows of a by TILE, splits of the rows of b].
extern "C" __global__ void __launch_bounds__(THREADS) cross_max(const CrossMax work) {
    __shared__ REAL a_tile[DEPTH][TILE + 1];
    __shared__ REAL b_tile[DEPTH][TILE + 1];
    __shared__ REAL bests[TILE][SIDE + 1];
    const u64 a_first = u64(blockIdx.x) * TILE;
    const u32 x = threadIdx.x % SIDE, y = threadIdx.x / SIDE;
    // The largest a.b / |b|
    REAL best[OWN];
#pragma unroll
    for (u32 i = 0; i < OWN; ++i) best[i] = REAL(__longlong_as_double(0xfff0000000000000ll));
    for (u64 b_first = u64(blockIdx.y) * TILE; b_first < work.b_rows; b_first += u64(gridDim.y) * TILE) {
        Sum totals[OWN][OWN] = {};
        REAL parts[OWN][OWN] = {};
        for (u64 start = 0; start < work.dim; start += DEPTH) {
            __syncthreads();
            load_tile(a_tile, work.a, a_first, work.a_rows, start, work.dim);
            load_tile(b_tile, work.b, b_first, work.b_rows, start, work.dim);
            __syncthreads();
            REAL sums[OWN][OWN] = {};
#pragma unroll
            for (u32 depth = 0; depth < DEPTH; ++depth) {
                REAL as[OWN], bs[OWN];
#pragma unroll
                for (u32 i = 0; i < OWN; ++i) {
                    as[i] = a_tile[depth][y + i * SIDE];
                    bs[i] = b_tile[depth][x + i * SIDE];
                }
#pragma unroll
                for (u32 i = 0; i < OWN; ++i) {
#pragma unroll
                    for (u32 j = 0; j < OWN; ++j) sums[i][j] += as[i] * bs[j];
                }
            }
            const bool fold = start / DEPTH % FOLD == FOLD - 1 || start + DEPTH >= work.dim;
#pragma unroll
            for (u32 i = 0; i < OWN; ++i) {
#pragma unroll
                for (u32 j = 0; j < OWN; ++j) {
                    parts[i][j] += sums[i][j];
                    if (fold) {
                        totals[i][j].add(parts[i][j]);
                        parts[i][j] = REAL(0);
                    }
                }
            }
        }
#pragma unroll
        for (u32 j = 0; j < OWN; ++j) {
            const u64 b_row = b_first + x + j * SIDE;
            if (b_row >= work.b_rows) continue;
            const REAL norm = REAL(work.b_norms[b_row]);
#pragma unroll
            for (u32 i = 0; i < OWN; ++i) {
                const REAL value = (totals[i][j].high + totals[i][j].low) / norm;
                // A NaN, which the caller reports, stays.
                if (!(value <= best[i]) && best[i] == best[i]) best[i] = value;
            }
        }
    }
#pragma unroll
    for (u32 i = 0; i < OWN; ++i) bests[y + i * SIDE][x] = best[i];
    __syncthreads();
    if (threadIdx.x < TILE && a_first + threadIdx.x < work.a_rows) {
        REAL value = bests[threadIdx.x][0];
        for (u32 i = 1; i < SIDE; ++i) {
            const REAL other = bests[threadIdx.x][i];
            if (!(other <= value) && value == value) value = other;
        }
        const u64 a_row = a_first + threadIdx.x;
        const f64 norm = work.a_norms[a_row];
        work.best[u64(blockIdx.y) * work.a_rows + a_row] = score(f64(value), norm * norm);
    }
}
