// What the kernels share. NVRTC compiles it without any header; tests compile it as C++ for the CPU.
//
// A kernel takes one structure by value whose fields are all 8 bytes wide, so that Rust and C++ agree on its layout.
// Its caller defines the dtypes: REAL, the one it computes in, and those of its tensors, each of f32, f64, bf16, f16.

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using f32 = float;
using f64 = double;

struct bf16 {
    u16 bits;
};
struct f16 {
    u16 bits;
};

// Threads of a block.
constexpr u32 THREADS = 256;
constexpr u32 WARP = 32;

// Tests look here for vector accesses that the device would refuse.
#ifndef CHECK_ALIGNED
#define CHECK_ALIGNED(pointer, bytes)
#endif

template <class R>
__device__ inline R widen(f32 value) {
    return R(value);
}
template <class R>
__device__ inline R widen(f64 value) {
    return R(value);
}
template <class R>
__device__ inline R widen(bf16 value) {
    return R(__uint_as_float(u32(value.bits) << 16));
}
template <class R>
__device__ inline R widen(f16 value) {
#ifdef __CUDA_ARCH__
    f32 wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
    return R(wide);
#else
    return R(half_to_float(value.bits));
#endif
}

// `narrow(value, to)` rounds to nearest even.
__device__ inline void narrow(f64 value, f64& to) { to = value; }
__device__ inline void narrow(f64 value, f32& to) { to = f32(value); }
__device__ inline void narrow(f32 value, f32& to) { to = value; }
__device__ inline void narrow(f32 value, f64& to) { to = value; }
__device__ inline void narrow(f32 value, bf16& to) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(value));
#else
    const u32 bits = __float_as_uint(value);
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    to.bits = is_nan ? u16(0x7fff) : u16((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}
__device__ inline void narrow(f32 value, f16& to) {
#ifdef __CUDA_ARCH__
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(value));
#else
    to.bits = float_to_half(value);
#endif
}
__device__ inline void narrow(f64 value, bf16& to) { narrow(f32(value), to); }
__device__ inline void narrow(f64 value, f16& to) { narrow(f32(value), to); }

__device__ constexpr u32 larger(u32 a, u32 b) { return a > b ? a : b; }

// How many elements of dtypes of these sizes a thread takes at once: 16 bytes of the widest.
__device__ constexpr u32 pack_of(u32 a, u32 b = 0, u32 c = 0) { return 16 / larger(a, larger(b, c)); }

// Consecutive elements that are read and written in one access.
template <class T, u32 N>
struct alignas(sizeof(T) * N) Pack {
    T values[N];
};

template <u32 N, class T>
__device__ inline Pack<T, N> load(const T* from) {
    CHECK_ALIGNED(from, sizeof(T) * N);
    return *reinterpret_cast<const Pack<T, N>*>(from);
}

// Of an assignment the compiler may make a store for each element.
template <u32 N, class T>
__device__ inline void store(T* to, const Pack<T, N>& pack) {
    CHECK_ALIGNED(to, sizeof(T) * N);
#ifdef __CUDA_ARCH__
    constexpr u32 BYTES = sizeof(T) * N;
    if constexpr (BYTES >= 8) {
        u32 words[BYTES / 4];
        memcpy(words, &pack, BYTES);
        const u64 address = __cvta_generic_to_global(to);
        if constexpr (BYTES == 8) {
            asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(address), "r"(words[0]), "r"(words[1]) : "memory");
        }
#pragma unroll
        for (u32 i = 0; i + 4 <= BYTES / 4; i += 4) {
            asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address + 4 * i), "r"(words[i]),
                         "r"(words[i + 1]), "r"(words[i + 2]), "r"(words[i + 3])
                         : "memory");
        }
        return;
    }
#endif
    *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

// Elements before the first whole pack.
template <u32 N, class T>
__device__ inline u32 before_packs(const T* pointer) {
    return u32((0 - u64(pointer)) % (sizeof(T) * N) / sizeof(T));
}

// Whether packs begin `head` elements after a pointer, or it is null.
template <u32 N, class T>
__device__ inline bool packs_begin(u32 head, const T* pointer) {
    return pointer == nullptr || before_packs<N>(pointer) == head;
}

// `len` elements of several tensors as packs, and single elements before and after them.
template <class Index>
struct Cut {
    Index head;
    Index packs;
    Index singles;

    // The place of the i-th of the singles.
    template <u32 N>
    __device__ Index single(Index i) const {
        return i < head ? i : packs * N + i;
    }
};

// Tensors whose packs begin at different elements have none.
template <u32 N, class Index, class First, class... Rest>
__device__ inline Cut<Index> cut(Index len, const First* first, const Rest*... rest) {
    const u32 head = before_packs<N>(first);
    Cut<Index> parts = {0, 0, len};
    if (head < len && (packs_begin<N>(head, rest) && ...)) {
        parts.head = head;
        parts.packs = (len - head) / N;
        parts.singles = len - parts.packs * N;
    }
    return parts;
}

// A number of the host, or one that the device has at an address.
struct Scalar {
    const void* at;
    u64 is_f64;
    f64 value;

    __device__ f64 get() const {
        if (at == nullptr) return value;
        return is_f64 ? *static_cast<const f64*>(at) : f64(*static_cast<const f32*>(at));
    }
};

// The sum over a warp, the same in each of its threads.
__device__ inline f64 warp_sum(f64 value) {
#pragma unroll
    for (u32 distance = WARP / 2; distance > 0; distance /= 2) {
        value += __shfl_xor_sync(0xffffffffu, value, distance);
    }
    return value;
}

// The sum over a block, the same in each of its threads, always in the same order.
__device__ inline f64 block_sum(f64 value) {
    __shared__ f64 sums[THREADS / WARP];
    constexpr u32 WARPS = THREADS / WARP;
    const u32 lane = threadIdx.x % WARP;
    value = warp_sum(value);
    // The sums of the call before have been read.
    __syncthreads();
    if (lane == 0) sums[threadIdx.x / WARP] = value;
    __syncthreads();
    return warp_sum(lane < WARPS ? sums[lane] : 0.0);
}

// The sum of an array, by one block.
__device__ inline f64 array_sum(const f64* values, u64 count) {
    constexpr u32 UNDER_WAY = 8;
    f64 sum = 0.0;
    for (u64 first = threadIdx.x; first < count; first += UNDER_WAY * THREADS) {
        f64 parts[UNDER_WAY];
#pragma unroll
        for (u32 u = 0; u < UNDER_WAY; ++u) {
            const u64 i = first + u * THREADS;
            parts[u] = i < count ? values[i] : 0.0;
        }
#pragma unroll
        for (u32 u = 0; u < UNDER_WAY; ++u) sum += parts[u];
    }
    return block_sum(sum);
}
