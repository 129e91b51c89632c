// The only file with intrinsics. One struct an instruction set, all with the same members; each gather_gemm_<isa>.cpp is
// compiled with the flags of its set and sees the struct `Simd` made for it. Everything has internal linkage: a function
// compiled for AVX-512 must never be the copy that the linker keeps for a machine without it.
//
// int8 dot product: x holds four u8 channels a lane, w four s8 weights a lane, exact in s32. Some sets split the operands
// once (X8, W8) so that no saturating 16-bit step is needed.
// max(a, b) is `a > b ? a : b`, so a NaN in `a` gives b, as the SSE instruction does; min likewise.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace sparsegan {
namespace {

#if defined(__AVX512VNNI__)

struct Simd {
  static constexpr int kLanes = 16;
  // Accumulator tiles [R][V] that fill the 32 registers without spilling.
  static constexpr int kMaxV8 = 3, kMaxV4 = 4;
  using I = __m512i;
  using F = __m512;
  using X8 = __m512i;
  using W8 = __m512i;

  static I load(const void* p) { return _mm512_loadu_si512(p); }
  static F load_f(const float* p) { return _mm512_loadu_ps(p); }
  static void store(void* p, I v) { _mm512_storeu_si512(p, v); }
  static void store_partial(void* p, I v, int n) { _mm512_mask_storeu_epi32(p, __mmask16((1u << n) - 1), v); }
  static F load_partial(const void* p, int n) { return _mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p); }
  static F gather(const float* p, int64_t stride, int n) {
    const I index = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                       _mm512_set1_epi32(int32_t(stride)));
    return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), __mmask16((1u << n) - 1), index, p, 4);
  }
  static I broadcast(const void* p) {
    int32_t word;
    std::memcpy(&word, p, 4);
    return _mm512_set1_epi32(word);
  }
  static I set1(int32_t v) { return _mm512_set1_epi32(v); }
  static F set1(float v) { return _mm512_set1_ps(v); }
  static I as_i(F v) { return _mm512_castps_si512(v); }
  static F as_f(I v) { return _mm512_castsi512_ps(v); }
  static F to_float(I v) { return _mm512_cvtepi32_ps(v); }
  static I round(F v) { return _mm512_cvtps_epi32(v); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F madd(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }  // a * b + c, rounded once
  // 1 / a for normal a: an estimate of 14 bits and one Newton step, at a fifth of the time of a division.
  static F reciprocal(F a) {
    const F y = _mm512_rcp14_ps(a);
    return _mm512_fmadd_ps(y, _mm512_fnmadd_ps(a, y, _mm512_set1_ps(1.0f)), y);
  }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F select_lt(F a, F b, F yes, F no) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes); }
  static I add(I a, I b) { return _mm512_add_epi32(a, b); }
  // Adds the lanes of each of four vectors to to[0..3].
  static void add_sums(const F (&v)[4], float* to) {
    auto halves = [](F a, F b) { return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); };
    const __m512d ab = _mm512_castps_pd(halves(v[0], v[1])), cd = _mm512_castps_pd(halves(v[2], v[3]));
    const F all = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), four));
  }
  static I bit_and(I a, I b) { return _mm512_and_si512(a, b); }
  static I bit_or(I a, I b) { return _mm512_or_si512(a, b); }
  template <int kBits>
  static I shift_left(I v) {
    return _mm512_slli_epi32(v, kBits);
  }
  template <int kBits>
  static I shift_right(I v) {
    return _mm512_srli_epi32(v, kBits);
  }
  // Four vectors of whole numbers, saturated to u8 after `zero` is added, into one: a0 b0 c0 d0 a1 b1 .. Without kAdd `zero` is
  // 0.
  template <bool kAdd = true>
  static I pack4(I a, I b, I c, I d, int32_t zero) {
    I ab = _mm512_packs_epi32(a, b), cd = _mm512_packs_epi32(c, d);
    if constexpr (kAdd) {
      const I z = _mm512_set1_epi16(int16_t(zero));
      ab = _mm512_adds_epi16(ab, z), cd = _mm512_adds_epi16(cd, z);
    }
    const I transpose = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    return _mm512_shuffle_epi8(_mm512_packus_epi16(ab, cd), transpose);
  }
  // The lanes of a below kFirst, those of b from there on.
  template <int kFirst>
  static I join(I a, I b) {
    return _mm512_mask_blend_epi32(__mmask16(0xFFFFu << kFirst), a, b);
  }
  // Sums of every kCount-th lane, 4 or 8.
  template <int kCount>
  static void fold(I a, int32_t* sums) {
    const __m256i eight = _mm256_add_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
    if constexpr (kCount == 8)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums), eight);
    else
      _mm_storeu_si128(reinterpret_cast<__m128i*>(sums),
                       _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1)));
  }
  // a0 a2 .. and a1 a3 .., each in the lower half of a register
  static void unzip(I a, I* even, I* odd) {
    *even = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 0, 2, 4, 6, 8, 10, 12, 14), a);
    *odd = _mm512_permutexvar_epi32(_mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 1, 3, 5, 7, 9, 11, 13, 15), a);
  }
  // a0 b0 a1 b1 .. over two registers
  static void interleave(I a, I b, I* lo, I* hi) {
    const I first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    *lo = _mm512_permutex2var_epi32(a, first, b);
    *hi = _mm512_permutex2var_epi32(a, _mm512_add_epi32(first, _mm512_set1_epi32(8)), b);
  }

  // Hides a value's origin from the optimiser, at no instruction.
  static void hide(I& v) { asm volatile("" : "+v"(v)); }
  static void hide(F& v) { asm volatile("" : "+v"(v)); }

  static X8 split_x(I x) { return x; }
  static W8 split_w(I w) { return w; }
  // Tied operands: from the intrinsics GCC 12 makes copies and spills of the accumulators, at half the speed.
  static void dot8(I& acc, X8 x, W8 w) { asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(x), "v"(w)); }
  static void fma(F& acc, F x, F w) { asm("vfmadd231ps %2, %1, %0" : "+v"(acc) : "v"(x), "v"(w)); }
};

#if defined(__AMX_INT8__) && !defined(SPARSEGAN_EMULATED_TILES)
#define SPARSEGAN_TILES
// The matrix unit: eight registers of 16 rows x 64 bytes. C in 0-3, B in 4-5, A in 6-7. Not GCC 12's own intrinsics: they do not
// tell the compiler that the configuration, or a tile, is read from memory, so that stores to it may be dropped or moved behind.
struct Tiles {
  static constexpr int kBytes = 1024, kRows = 16, kRowBytes = 64;

  // While it lives the thread has tiles, with `rows` rows in A and C.
  class Scope {
   public:
    explicit Scope(int rows) {
      struct alignas(64) Config {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
      } config;
      for (int i = 0; i < 8; i++) config.row_bytes[i] = kRowBytes, config.rows[i] = uint8_t(i == 4 || i == 5 ? kRows : rows);
      asm volatile("ldtilecfg %0" : : "m"(config));
    }
    ~Scope() { asm volatile("tilerelease"); }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;
  };

  template <int kTile>
  [[gnu::always_inline]] static void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
  }
  // Rows `stride` bytes apart.
  template <int kTile>
  [[gnu::always_inline]] static void load(const void* p, int64_t stride = kRowBytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kTile>
  [[gnu::always_inline]] static void store(void* p, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(kTile) : "memory");
  }
  // C += A (signed) * B (unsigned)
  template <int kC, int kA, int kB>
  [[gnu::always_inline]] static void dot() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
  }
};
#elif defined(SPARSEGAN_EMULATED_TILES)
#define SPARSEGAN_TILES
// The same in plain C++, for tests: on machines without the unit, and because sanitizers see what these tiles read and write.
struct Tiles {
  static constexpr int kBytes = 1024, kRows = 16, kRowBytes = 64;
  struct State {
    int rows = 0;
    uint8_t bytes[8][kRows][kRowBytes];
  };
  static State& state() {
    thread_local State here;
    return here;
  }
  static int rows(int tile) { return tile == 4 || tile == 5 ? kRows : state().rows; }

  class Scope {
   public:
    explicit Scope(int rows) { state().rows = rows; }
    ~Scope() { state().rows = 0; }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;
  };

  template <int kTile>
  static void zero() {
    std::memset(state().bytes[kTile], 0, kBytes);
  }
  template <int kTile>
  static void load(const void* p, int64_t stride = kRowBytes) {
    for (int r = 0; r < rows(kTile); r++)
      std::memcpy(state().bytes[kTile][r], static_cast<const uint8_t*>(p) + r * stride, kRowBytes);
  }
  template <int kTile>
  static void store(void* p, int64_t stride) {
    for (int r = 0; r < rows(kTile); r++) std::memcpy(static_cast<uint8_t*>(p) + r * stride, state().bytes[kTile][r], kRowBytes);
  }
  template <int kC, int kA, int kB>
  static void dot() {
    State& s = state();
    for (int r = 0; r < s.rows; r++)
      for (int n = 0; n < kRows; n++) {
        int32_t sum;
        std::memcpy(&sum, s.bytes[kC][r] + 4 * n, 4);
        for (int k = 0; k < kRowBytes; k++) sum += int8_t(s.bytes[kA][r][k]) * int32_t(s.bytes[kB][k / 4][4 * n + k % 4]);
        std::memcpy(s.bytes[kC][r] + 4 * n, &sum, 4);
      }
  }
};
#endif

#elif defined(__AVX2__)

struct Simd {
  static constexpr int kLanes = 8;
  static constexpr int kMaxV8 = 1, kMaxV4 = 2;
  using I = __m256i;
  using F = __m256;

  static I mask(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
  static I load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static F load_f(const float* p) { return _mm256_loadu_ps(p); }
  static void store(void* p, I v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
  static void store_partial(void* p, I v, int n) { _mm256_maskstore_epi32(static_cast<int*>(p), mask(n), v); }
  static F load_partial(const void* p, int n) { return as_f(_mm256_maskload_epi32(static_cast<const int*>(p), mask(n))); }
  static F gather(const float* p, int64_t stride, int n) {
    const I index = _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(int32_t(stride)));
    return _mm256_mask_i32gather_ps(_mm256_setzero_ps(), p, index, _mm256_castsi256_ps(mask(n)), 4);
  }
  static I broadcast(const void* p) {
    int32_t word;
    std::memcpy(&word, p, 4);
    return _mm256_set1_epi32(word);
  }
  static I set1(int32_t v) { return _mm256_set1_epi32(v); }
  static F set1(float v) { return _mm256_set1_ps(v); }
  static I as_i(F v) { return _mm256_castps_si256(v); }
  static F as_f(I v) { return _mm256_castsi256_ps(v); }
  static F to_float(I v) { return _mm256_cvtepi32_ps(v); }
  static I round(F v) { return _mm256_cvtps_epi32(v); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F madd(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F reciprocal(F a) { return _mm256_div_ps(_mm256_set1_ps(1.0f), a); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F select_lt(F a, F b, F yes, F no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
  static I add(I a, I b) { return _mm256_add_epi32(a, b); }
  static void add_sums(const F (&v)[4], float* to) {
    const F all = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), four));
  }
  static I bit_and(I a, I b) { return _mm256_and_si256(a, b); }
  static I bit_or(I a, I b) { return _mm256_or_si256(a, b); }
  template <int kBits>
  static I shift_left(I v) {
    return _mm256_slli_epi32(v, kBits);
  }
  template <int kBits>
  static I shift_right(I v) {
    return _mm256_srli_epi32(v, kBits);
  }
  template <bool kAdd = true>
  static I pack4(I a, I b, I c, I d, int32_t zero) {
    I ab = _mm256_packs_epi32(a, b), cd = _mm256_packs_epi32(c, d);
    if constexpr (kAdd) {
      const I z = _mm256_set1_epi16(int16_t(zero));
      ab = _mm256_adds_epi16(ab, z), cd = _mm256_adds_epi16(cd, z);
    }
    const I transpose = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    return _mm256_shuffle_epi8(_mm256_packus_epi16(ab, cd), transpose);
  }
  template <int kFirst>
  static I join(I a, I b) {
    return _mm256_blend_epi32(a, b, (0xFF << kFirst) & 0xFF);
  }
  template <int kCount>
  static void fold(I a, int32_t* sums) {
    if constexpr (kCount == 8)
      store(sums, a);
    else
      _mm_storeu_si128(reinterpret_cast<__m128i*>(sums),
                       _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1)));
  }
  static void unzip(I a, I* even, I* odd) {
    *even = _mm256_permutevar8x32_epi32(a, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
    *odd = _mm256_permute2x128_si256(*even, *even, 0x11);
  }
  static void interleave(I a, I b, I* lo, I* hi) {
    const I x = _mm256_unpacklo_epi32(a, b), y = _mm256_unpackhi_epi32(a, b);
    *lo = _mm256_permute2x128_si256(x, y, 0x20);
    *hi = _mm256_permute2x128_si256(x, y, 0x31);
  }

  static void hide(I& v) { asm volatile("" : "+x"(v)); }
  static void hide(F& v) { asm volatile("" : "+x"(v)); }

#if defined(__AVXVNNI__)
  using X8 = __m256i;
  using W8 = __m256i;
  static X8 split_x(I x) { return x; }
  static W8 split_w(I w) { return w; }
  static void dot8(I& acc, X8 x, W8 w) { asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(x), "x"(w)); }
#else
  // Even and odd channels as 16-bit pairs: vpmaddubsw would saturate (255 * 127 * 2 > 32767), vpmaddwd is exact.
  struct X8 {
    I even, odd;
  };
  using W8 = X8;
  static void hide(X8& x) { hide(x.even), hide(x.odd); }
  static X8 split_x(I x) { return {_mm256_and_si256(x, _mm256_set1_epi16(255)), _mm256_srli_epi16(x, 8)}; }
  static W8 split_w(I w) { return {_mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8), _mm256_srai_epi16(w, 8)}; }
  static void dot8(I& acc, const X8& x, const W8& w) {
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(x.even, w.even));
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(x.odd, w.odd));
  }
#endif
  static void fma(F& acc, F x, F w) { acc = _mm256_fmadd_ps(x, w, acc); }
};

#else

// Any compiler's vector extension: SSE2, NEON, or plain registers.
struct Simd {
  static constexpr int kLanes = 8;
  static constexpr int kMaxV8 = 1, kMaxV4 = 1;
  typedef int32_t I __attribute__((vector_size(32)));
  typedef uint32_t U __attribute__((vector_size(32)));
  typedef int16_t H __attribute__((vector_size(32)));
  typedef float F __attribute__((vector_size(32)));

  static I load(const void* p) {
    I v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  static F load_f(const float* p) { return as_f(load(p)); }
  static void store(void* p, I v) { std::memcpy(p, &v, sizeof(v)); }
  static void store_partial(void* p, I v, int n) { std::memcpy(p, &v, size_t(n) * 4); }
  static F load_partial(const void* p, int n) {
    F v = {};
    std::memcpy(&v, p, size_t(n) * 4);
    return v;
  }
  static F gather(const float* p, int64_t stride, int n) {
    F v = {};
    for (int i = 0; i < n; i++) v[i] = p[i * stride];
    return v;
  }
  static I broadcast(const void* p) {
    int32_t word;
    std::memcpy(&word, p, 4);
    return set1(word);
  }
  static I set1(int32_t v) { return v - I{}; }
  static F set1(float v) { return v - F{}; }
  static I as_i(F v) { return (I)v; }
  static F as_f(I v) { return (F)v; }
  static F to_float(I v) { return __builtin_convertvector(v, F); }
  // To nearest even: adding 1.5 * 2^23 leaves no fraction bits of |v| < 2^22. Below that and for NaN a large negative number.
  static I round(F v) {
    const I near = as_i(v + 12582912.0f) - 0x4B400000, in_range = v > -4194304.0f;
    return (near & in_range) | (-32768 & ~in_range);
  }
  static F add(F a, F b) { return a + b; }
  static F mul(F a, F b) { return a * b; }
  static F madd(F a, F b, F c) {  // by way of float64, whose product is exact: a library fmaf would be far slower
    typedef double D __attribute__((vector_size(64)));
    const D y = __builtin_convertvector(a, D) * __builtin_convertvector(b, D) + __builtin_convertvector(c, D);
    return __builtin_convertvector(y, F);
  }
  static F reciprocal(F a) { return 1.0f / a; }
  static F max(F a, F b) { return as_f(((a > b) & as_i(a)) | (~(a > b) & as_i(b))); }
  static F min(F a, F b) { return as_f(((a < b) & as_i(a)) | (~(a < b) & as_i(b))); }
  static F select_lt(F a, F b, F yes, F no) { return as_f(((a < b) & as_i(yes)) | (~(a < b) & as_i(no))); }
  static I add(I a, I b) { return (I)((U)a + (U)b); }
  static void add_sums(const F (&v)[4], float* to) {
    for (int j = 0; j < 4; j++)
      for (int i = 0; i < kLanes; i++) to[j] += v[j][i];
  }
  static I bit_and(I a, I b) { return a & b; }
  static I bit_or(I a, I b) { return a | b; }
  template <int kBits>
  static I shift_left(I v) {
    return v << kBits;
  }
  template <int kBits>
  static I shift_right(I v) {
    return (I)((U)v >> kBits);
  }
  template <int kFirst>
  static I join(I a, I b) {
    for (int i = kFirst; i < kLanes; i++) a[i] = b[i];
    return a;
  }
  static I saturate(I v, int32_t zero) {
    v += zero;
    v &= ~(v < 0);
    return (v & (v < 255)) | (255 & (v >= 255));
  }
  template <bool kAdd = true>
  static I pack4(I a, I b, I c, I d, int32_t zero) {
    return saturate(a, zero) | saturate(b, zero) << 8 | saturate(c, zero) << 16 | saturate(d, zero) << 24;
  }
  template <int kCount>
  static void fold(I a, int32_t* sums) {
    for (int r = 0; r < kCount; r++) sums[r] = 0;
    for (int i = 0; i < kLanes; i++) sums[i % kCount] += a[i];
  }
  static void unzip(I a, I* even, I* odd) {
    for (int i = 0; i < kLanes / 2; i++) {
      const int32_t first = a[2 * i], second = a[2 * i + 1];
      (*even)[i] = first, (*odd)[i] = second;
    }
  }
  static void interleave(I a, I b, I* lo, I* hi) {
    for (int i = 0; i < kLanes / 2; i++) {
      (*lo)[2 * i] = a[i], (*lo)[2 * i + 1] = b[i];
      (*hi)[2 * i] = a[i + kLanes / 2], (*hi)[2 * i + 1] = b[i + kLanes / 2];
    }
  }

  static void hide(I& v) { asm volatile("" : "+m"(v)); }
  static void hide(F& v) { asm volatile("" : "+m"(v)); }

  // Even and odd channels as 16-bit pairs: their products fit 16 bits (255 * 128), and every machine multiplies those.
  struct X8 {
    H even, odd;
  };
  using W8 = X8;
  static void hide(X8& x) { asm volatile("" : "+m"(x)); }
  static X8 split_x(I x) { return {(H)(x & 0x00FF00FF), (H)((x >> 8) & 0x00FF00FF)}; }
  static W8 split_w(I w) { return {(H)((H)w << 8) >> 8, (H)w >> 8}; }
  static void dot8(I& acc, const X8& x, const W8& w) {
    const I even = (I)(x.even * w.even), odd = (I)(x.odd * w.odd);
    acc += ((even << 16) >> 16) + (even >> 16) + ((odd << 16) >> 16) + (odd >> 16);
  }
  static void fma(F& acc, F x, F w) { acc += x * w; }
};

#endif

// e^x for x in [-87, 87], relative error under 2e-7: 2^n * e^r with |r| <= ln(2)/2, Taylor polynomial of degree 6.
inline Simd::F simd_exp(Simd::F x) {
  using S = Simd;
  const S::I n = S::round(S::mul(x, S::set1(1.44269504088896341f)));
  const S::F nf = S::to_float(n);
  S::F r = S::madd(nf, S::set1(-0.693359375f), x);  // ln 2 in two parts, the first exact in few bits
  r = S::madd(nf, S::set1(2.12194440e-4f), r);
  S::F p = S::set1(1.0f / 720);
  for (const float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = S::madd(p, r, S::set1(c));
  return S::mul(p, S::as_f(S::shift_left<23>(S::add(n, S::set1(127)))));
}

// Clamps a NaN to a NaN: max and min return their second operand then, so the value goes second.
inline Simd::F simd_clamp(Simd::F x, float lo, float hi) { return Simd::min(Simd::set1(hi), Simd::max(Simd::set1(lo), x)); }

inline Simd::F simd_sigmoid(Simd::F x) {
  using S = Simd;
  const S::F one = S::set1(1.0f);
  return S::reciprocal(S::add(one, simd_exp(simd_clamp(S::mul(x, S::set1(-1.0f)), -87.0f, 87.0f))));
}

// Far below zero sigmoid stops at e^-87, so x stops, too.
inline Simd::F simd_silu(Simd::F x) { return Simd::mul(Simd::max(Simd::set1(-88.0f), x), simd_sigmoid(x)); }

// 1 - 2 / (e^2x + 1); near 0, where that cancels, the odd Taylor series up to x^9 (|x| < 0.25: relative error under 2e-7).
inline Simd::F simd_tanh(Simd::F x) {
  using S = Simd;
  const S::F one = S::set1(1.0f), x2 = S::mul(x, x);
  S::F series = S::set1(62.0f / 2835);
  for (const float c : {-17.0f / 315, 2.0f / 15, -1.0f / 3, 1.0f}) series = S::add(S::mul(series, x2), S::set1(c));
  series = S::mul(series, x);
  const S::F e = simd_exp(simd_clamp(S::mul(x, S::set1(2.0f)), -30.0f, 30.0f));
  const S::F far = S::add(one, S::mul(S::set1(-2.0f), S::reciprocal(S::add(e, one))));
  return S::select_lt(x2, S::set1(0.0625f), series, far);
}

// x * (1 + erf(x / sqrt 2)) / 2 with erf by Abramowitz and Stegun 7.1.26, absolute error under 1.5e-7.
inline Simd::F simd_gelu(Simd::F x) {
  using S = Simd;
  const S::F one = S::set1(1.0f);
  const S::F z = S::as_f(S::bit_and(S::as_i(S::mul(x, S::set1(0.70710678f))), S::set1(0x7FFFFFFF)));
  const S::F t = S::reciprocal(S::madd(z, S::set1(0.3275911f), one));
  S::F p = S::set1(1.061405429f);
  for (const float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) p = S::madd(p, t, S::set1(c));
  const S::F tail = S::mul(S::mul(p, t), simd_exp(simd_clamp(S::mul(S::mul(z, z), S::set1(-1.0f)), -87.0f, 0.0f)));
  // tail = 1 - erf(|x| / sqrt 2): half of it is what is missing on the positive side, and what is left on the negative
  const S::F half = S::mul(tail, S::set1(0.5f));
  return S::mul(x, S::select_lt(x, S::set1(0.0f), half, S::add(one, S::mul(half, S::set1(-1.0f)))));
}

// Whole steps of the u8 format, still without the zero point; S::pack4 adds it and saturates: q = clamp(round(x * inv_scale)
// + zero, 0, 255). The upper clamp is here because the conversion turns what exceeds int32 into its least number, which is where
// a NaN and the far negative end up too, rightly: at the lowest step.
inline Simd::I simd_round(Simd::F steps) { return Simd::round(Simd::min(Simd::set1(1024.0f), steps)); }
inline Simd::I simd_quantize(Simd::F x, float inv_scale) { return simd_round(Simd::mul(x, Simd::set1(inv_scale))); }

// Two channels rounded to bf16 (nearest even) into one lane. Infinities and quiet NaNs are cut off, which keeps them: adding
// the rounding bit to a NaN could overflow it into a number.
inline Simd::I simd_pack_bf16(Simd::F lo, Simd::F hi) {
#if defined(__AVX512BF16__)
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
                                         19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(hi, lo));
#else
  using S = Simd;
  auto round = [](S::F v) {
    const S::I bits = S::as_i(v);
    const S::I odd = S::bit_and(S::shift_right<16>(bits), S::set1(1));
    const S::F rounded = S::as_f(S::add(S::add(bits, S::set1(0x7FFF)), odd));
    const S::F magnitude = S::as_f(S::bit_and(bits, S::set1(0x7FFFFFFF)));
    return S::as_i(S::select_lt(magnitude, S::set1(INFINITY), rounded, v));
  };
  return S::bit_or(S::shift_right<16>(round(lo)), S::bit_and(round(hi), S::set1(int32_t(0xFFFF0000))));
#endif
}

}  // namespace
}  // namespace sparsegan
