/* The model for a few positions at a time on a CPU: compiled and called by decode.py.

The mathematics is model.py's under "absorb": names are those of its modules, and the comment of a function names the
one that it computes. decode.py compares the two when a model is loaded, so change both. Sums are in float32.

Decoding reads every weight that a byte needs for two operations on it, so it is as fast as memory if nothing else takes
time: no calls between operations, no copies, no thread that waits. One call of `run` does all layers and the head.
Threads go through the layers side by side. Each computes some outputs of a product, so it reads its own rows of the
    weights, for all positions at once; then they wait for each other. What is small each computes for itself instead.
Experts are visited one after the other, each by the positions that are routed to it, so that it is read once.
The KV cache is divided among threads by positions. Each attends to its own, with the softmax's maximum and sum carried
    along; these partial sums are then merged (Milakov and Gimelshein 2018; Dao et al. 2023, "Flash-Decoding").

Shapes: N positions of the call, `n_rows` rows of `n_each`; H heads; C `kv_lora_rank`; R `qk_rope_head_dim`; K experts a
position, E experts. */

#include <math.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#ifdef __AVX2__
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

/* A tile of a product, up to OUTPUTS x ROWS sums of LANES numbers each, fits the registers. */
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4 /* NEON; to GCC, longer vectors there are numbers one by one */
#endif
#if defined(__AVX512F__) || defined(__aarch64__) /* they have 32 registers, not 16 */
#define HALF_TILE 4 /* outputs of a tile of many rows */
#else
#define HALF_TILE 2
#endif
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define FP8_IN_PAIRS /* else FP8 is multiplied in float32 */
#endif
#define OUTPUTS 4
#define ROWS 6
#define SCALED 128 /* rows and columns of a block of FP8 weights, which has one scale: fp8_ops.BLOCK */
#define BLOCK 256 /* positions of a KV cache that are attended to at a time: they stay in the L2 cache */
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ints){__VA_ARGS__})
#endif
/* Four of a quad of `a` and the same of `b` (from B on), alike in every quad of a vector. */
#define B LANES
#define TWO_QUADS(i, j, k, l) i, j, k, l, i + 4, j + 4, k + 4, l + 4
#if LANES == 16
#define QUADS(i, j, k, l) TWO_QUADS(i, j, k, l), TWO_QUADS(i + 8, j + 8, k + 8, l + 8)
#elif LANES == 8
#define QUADS TWO_QUADS
#else
#define QUADS(i, j, k, l) i, j, k, l
#endif
#if defined(__x86_64__)
#define PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define PAUSE() __asm__ volatile("yield")
#else
#define PAUSE() (void)0
#endif
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float pairs __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
typedef float quad __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t shorts __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef int32_t unaligned __attribute__((aligned(1), may_alias));

/* --- What decode.py fills in, field by field ------------------------------------------------------------------- */

/* How a matrix is stored and multiplied. PAIRS are stored as BF16 are, but the other side is rounded to bfloat16, too,
   where the processor has an instruction for the sum of two such products; FP8_PAIRS are FP8 with that other side. */
enum { FP32, BF16, PAIRS, FP8, FP8_PAIRS };

typedef struct {
    const void *data;     /* (outputs, n_in), row by row */
    const float *scales;  /* of FP8's blocks: (outputs / height, height / SCALED, n_in / SCALED), rounded up */
    int32_t kind, n_in, height; /* height: outputs of one of the matrices below each other */
} Matrix;

typedef struct {
    const float *weight;
    float eps;
    int32_t size;
} Norm;

typedef struct {
    Matrix w1, w2, w3; /* of routed experts: one matrix below the other */
    int32_t width;     /* of one; 0: there is none */
} Mlp;

typedef struct {
    Norm attn_norm, q_norm, kv_norm, ffn_norm;
    Matrix wq_a, wq_b, wkv_a; /* without a query's rank, wq_b is wq, and wq_a is nothing */
    Matrix w_k, w_v, wo;      /* the halves of wkv_b: (H·C, nope) and (H·v, C) */
    Mlp mlp, experts;         /* of a MoE layer, mlp is the shared experts */
    Matrix gate;
    const float *gate_bias; /* (E), or nothing */
    Matrix index_q, index_k, index_weights; /* of an indexer: its wq_b, wk and weights_proj, or nothing */
    Norm index_norm;
    const float *index_bias; /* of that norm */
} Block;

typedef struct {
    int32_t vocab, dim, heads, rank, nope, rope, v, context;
    int32_t n_experts, n_activated, n_groups, n_limited, is_softmax, act;
    int32_t index_heads, index_dim, index_topk; /* 0 without indexers */
    float route_scale, scale;
    const float *cos, *sin; /* (context, R/2) */
} Shape;

typedef struct {
    Matrix embed;
    Norm enorm, hnorm; /* of an MTP module, as eh_proj */
    Matrix eh_proj;    /* nothing: the main model */
    Block *blocks;
    int32_t n_blocks;
    Norm norm;
    Matrix head; /* (vocab, dim) */
} Stack;

typedef struct {
    const int64_t *tokens; /* (N) */
    const int32_t *positions; /* (N), in the KV cache */
    const float *before;   /* (N, dim), the states that an MTP module goes on from */
    float *states;         /* (N, dim), a result */
    float *logits;         /* (N, vocab), the other */
    void **kv_caches;      /* the KV cache of each block, (n_rows, capacity, C + R) */
    void **index_caches;   /* and its index keys, (n_rows, capacity, index_dim), or nothing */
    int32_t n_rows, n_each, capacity, kind, threads; /* kind: of the caches */
} Call;

/* --- Numbers ---------------------------------------------------------------------------------------------------- */

/* Bytes of a number. */
INLINE long size_of(int kind) { return kind == FP32 ? 4 : kind == FP8 || kind == FP8_PAIRS ? 1 : 2; }

/* e4m3 is read 2^-8 times as large as it is, as a float16 with its bits is, for `scale_row` to make up for. */
#define FP8_FACTOR 256

INLINE vec load_fp8(const int8_t *at) {
#if defined(__AVX512F__)
    __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)at)), 7);
    return (vec)_mm512_cvtph_ps(_mm256_and_si256(wide, _mm256_set1_epi16(-0x4001))); /* the sign is in two bits */
#elif defined(__AVX2__)
    __m128i wide = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i *)at)), 7);
    return (vec)_mm256_cvtph_ps(_mm_and_si128(wide, _mm_set1_epi16(-0x4001)));
#else /* each lane has all four, and moves one of them to its upper end */
    ints four = (ints){} + *(const unaligned *)at;
    return (vec)((four << (ints){24, 16, 8, 0}) >> 4 & (int32_t)0x87f00000) * 0x1p112f;
#endif
}

INLINE vec load(const void *data, long i, int kind) {
    if (kind == FP32) return *(const vec *)((const float *)data + i);
    if (kind == FP8) return load_fp8((const int8_t *)data + i);
    const uint16_t *at = (const uint16_t *)data + i;
#if defined(__AVX512F__)
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)at)), 16);
#elif defined(__AVX2__)
    return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)at)), 16);
#elif defined(__ARM_NEON)
    return (vec)vshll_n_u16(vld1_u16(at), 16);
#else
    return (vec)(__builtin_convertvector(*(const shorts *)at, words) << 16);
#endif
}

INLINE float load_one(const void *data, long i, int kind) {
    if (kind == FP32) return ((const float *)data)[i];
    union { uint32_t bits; float value; } u;
    if (size_of(kind) == 1) {
        u.bits = (uint32_t)((const int8_t *)data)[i] << 20 & 0x87f00000;
        return u.value * 0x1p112f;
    }
    u.bits = (uint32_t)((const uint16_t *)data)[i] << 16;
    return u.value;
}

static void store_one(void *data, long i, int kind, float value) {
    union { float value; uint32_t bits; } u = {value};
    uint32_t bits = u.bits + 0x7fff + (u.bits >> 16 & 1); /* to nearest, ties to even */
    if (kind == FP32) ((float *)data)[i] = value;
    else ((uint16_t *)data)[i] = (value != value ? u.bits | 0x400000 : bits) >> 16; /* no number stays none */
}

INLINE quad sum_quads(vec a) { /* four partial sums */
    union { vec all; quad quads[LANES / 4]; } u = {a};
    quad sum = u.quads[0];
    for (int i = 1; i < LANES / 4; i++) sum += u.quads[i];
    return sum;
}

INLINE float sum_lanes(vec a) {
    quad sum = sum_quads(a);
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

INLINE quad sum_lanes_of_4(vec a, vec b, vec c, vec d) {
    vec ab = SHUFFLE(a, b, QUADS(0, B, 1, B + 1)) + SHUFFLE(a, b, QUADS(2, B + 2, 3, B + 3));
    vec cd = SHUFFLE(c, d, QUADS(0, B, 1, B + 1)) + SHUFFLE(c, d, QUADS(2, B + 2, 3, B + 3));
    return sum_quads(SHUFFLE(ab, cd, QUADS(0, 1, B, B + 1)) + SHUFFLE(ab, cd, QUADS(2, 3, B + 2, B + 3)));
}
#undef B

INLINE vec select_lanes(ints where, vec a, vec b) { return (vec)((where & (ints)a) | (~where & (ints)b)); }

/* e^x to three units in the last place, for x from -87 to 88, and beyond as at these ends: 2^n e^r with
   |r| <= ln(2) / 2, and e^r by its series. */
INLINE vec exp_lanes(vec x) {
    x = select_lanes(x < -87.0f, (vec){} - 87.0f, x);
    x = select_lanes(x > 88.0f, (vec){} + 88.0f, x);
    vec shifted = x * 1.44269504f + 12582912.0f; /* rounds: no fraction is left beside 1.5 * 2^23 */
    vec n = shifted - 12582912.0f;
    vec r = x - n * 0.693145752f - n * 1.42860677e-6f;
    vec e = ((((r * (1.0f / 720) + 1.0f / 120) * r + 1.0f / 24) * r + 1.0f / 6) * r + 0.5f) * r * r + r + 1;
    return e * (vec)(((ints)shifted << 23) + 0x3f800000); /* a product: what is no number stays none */
}

/* The first of `all` things that thread `t` does; the next thread's is its end. Whole tiles, where there are many. */
static int first_of(int all, int t, int threads) {
    if (t == threads) return all;
    return (int)((int64_t)all * t / threads / OUTPUTS * OUTPUTS);
}

/* --- Products --------------------------------------------------------------------------------------------------- */

typedef struct {
    float *data;
    long stride;
    const int *index; /* which rows, or nothing: the first ones */
} Rows;

INLINE float *row_of(Rows rows, int i) { return rows.data + (rows.index ? rows.index[i] : i) * rows.stride; }

/* sum + a . b, each in `kind`: of pairs, a lane has two numbers, and the sum of their products is a number. */
INLINE vec multiply_add(vec sum, vec a, vec b, int kind) {
#ifdef __AVX512BF16__
    if (kind == PAIRS) return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
    return sum + a * b;
}

/* Numbers of a row as they are multiplied: LANES, or of PAIRS twice as many. */
INLINE vec operand(const void *data, long i, int kind) {
    return kind == PAIRS ? (vec) * (const pairs *)((const uint16_t *)data + i) : load(data, i, kind);
}

#ifdef FP8_IN_PAIRS
/* The two bytes in bfloat16 of e4m3's numbers from 0 on, 2^-8 times as large. The first eight are subnormal in e4m3. */
#define EIGHT(x) x, x, x, x, x, x, x, x
#define SIXTEEN 0, 0x10, 0x20, 0x30, 0x40, 0x50, 0x60, 0x70, 0x80, 0x90, 0xa0, 0xb0, 0xc0, 0xd0, 0xe0, 0xf0
static const uint8_t high_bytes[128] = {0, 0x37, 0x37, 0x37, 0x38, 0x38, 0x38, 0x38, EIGHT(0x38), EIGHT(0x39),
    EIGHT(0x39), EIGHT(0x3a), EIGHT(0x3a), EIGHT(0x3b), EIGHT(0x3b), EIGHT(0x3c), EIGHT(0x3c), EIGHT(0x3d),
    EIGHT(0x3d), EIGHT(0x3e), EIGHT(0x3e), EIGHT(0x3f), EIGHT(0x3f)};
static const uint8_t low_bytes[128] = {0, 0, 0x80, 0xc0, 0, 0x20, 0x40, 0x60, 0x80, 0x90, 0xa0, 0xb0, 0xc0, 0xd0, 0xe0,
    0xf0, SIXTEEN, SIXTEEN, SIXTEEN, SIXTEEN, SIXTEEN, SIXTEEN, SIXTEEN};

/* 64 of FP8_PAIRS: of each 16 the first 8 in one vector of pairs, the others in the other, as `scale_row` orders x. */
INLINE void load_fp8_pairs(const void *at, vec pairs_of[2]) {
    __m512i codes = _mm512_loadu_si512(at), *low = (__m512i *)low_bytes, *high = (__m512i *)high_bytes;
    __m512i l = _mm512_permutex2var_epi8(_mm512_loadu_si512(low), codes, _mm512_loadu_si512(low + 1));
    __m512i h = _mm512_permutex2var_epi8(_mm512_loadu_si512(high), codes, _mm512_loadu_si512(high + 1));
    h = _mm512_or_si512(h, _mm512_and_si512(codes, _mm512_set1_epi8(-128))); /* the sign */
    pairs_of[0] = (vec)_mm512_unpacklo_epi8(l, h), pairs_of[1] = (vec)_mm512_unpackhi_epi8(l, h);
}
#endif

/* The products of `outputs` rows of weights with n of x, to out[row][output]. Constants, so the sums are registers. */
INLINE void tile(const char *w, int kind, int n_in, const void *const *x, int outputs, int n, float out[][OUTPUTS]) {
    vec sums[OUTPUTS][ROWS] = {};
    long bytes = size_of(kind), size = n_in * bytes;
    int other = kind == PAIRS || kind == FP8_PAIRS ? PAIRS : FP32, vectors = kind == FP8_PAIRS ? 2 : 1, i = 0;
    int lanes = other == PAIRS ? 2 * LANES : LANES;
    for (; i + vectors * lanes <= n_in; i += vectors * lanes) {
        vec weights[OUTPUTS][2];
        for (long j = 0; j < outputs * vectors * lanes * bytes; j += 64) /* what comes some tiles later is on its way */
            __builtin_prefetch(w + 4 * OUTPUTS * size + i * outputs * bytes + j, 0, 2);
        for (int o = 0; o < outputs; o++) {
#ifdef FP8_IN_PAIRS
            if (kind == FP8_PAIRS) load_fp8_pairs(w + o * size + i, weights[o]);
            else
#endif
                weights[o][0] = operand(w + o * size, i, kind);
        }
        for (int r = 0; r < n; r++)
            for (int v = 0; v < vectors; v++) {
                vec values = operand(x[r], i + v * lanes, other);
                for (int o = 0; o < outputs; o++)
                    sums[o][r] = multiply_add(sums[o][r], weights[o][v], values, other);
            }
    }
#define SUM(k) sums[(k) % outputs][(k) / outputs]
    for (int k = 0; k < outputs * n; k += 4) {
        quad four = sum_lanes_of_4(SUM(k), SUM(k + 1), SUM(k + 2), SUM(k + 3));
        for (int m = k; m < k + 4 && m < outputs * n; m++) out[m / outputs][m % outputs] = four[m - k];
    }
    for (; i < n_in; i++)
        for (int r = 0; r < n; r++)
            for (int o = 0; o < outputs; o++) out[r][o] += load_one(w + o * size, i, kind) * load_one(x[r], i, other);
}

/* y[r][o] = x[r] . w[o], or += where it adds, for outputs from..to and n rows; y[r][0] is output `from`. */
INLINE void matmul_kind(Matrix w, int kind, int from, int to, Rows x, Rows y, int n, int adds) {
    long size = w.n_in * size_of(kind);
    int chunks = (n + ROWS - 1) / ROWS;
    for (int o = from, count; o < to; o += count) {
        const char *weights = (const char *)w.data + o * size;
        count = to - o < OUTPUTS ? 1 : OUTPUTS;
        for (int chunk = 0; chunk < chunks; chunk++) {
            int start = n * chunk / chunks, more = n * (chunk + 1) / chunks - start;
            const void *rows[ROWS];
            float out[ROWS][OUTPUTS];
            for (int r = 0; r < more; r++) rows[r] = row_of(x, start + r);
#define TILE(n) tile(weights, kind, w.n_in, rows, OUTPUTS, n, out)
#define HALF_TILES(n)                         \
    for (int h = 0; h < OUTPUTS; h += HALF_TILE) \
    tile(weights + h * size, kind, w.n_in, rows, HALF_TILE, n, (float(*)[OUTPUTS])(out[0] + h))
            if (count == 1)
                for (int r = 0; r < more; r++) tile(weights, kind, w.n_in, rows + r, 1, 1, out + r);
            else if (more == 1) TILE(1);
            else if (more == 2) TILE(2);
            else if (more == 3) TILE(3);
            else if (more == 4) HALF_TILES(4);
            else if (more == 5) HALF_TILES(5);
            else HALF_TILES(6);
            for (int r = 0; r < more; r++) {
                float *to_row = row_of(y, start + r) + o - from;
                if (count == 1) *to_row = out[r][0] + (adds ? *to_row : 0);
                else *(quad *)to_row = *(quad *)out[r] + (adds ? *(quad *)to_row : (quad){});
            }
        }
    }
}

#ifdef __AVX512BF16__
/* Rounds n numbers to bfloat16, where they are or elsewhere. */
static void narrow_row(const float *x, int n, void *to) {
    int i = 0;
    for (; i + LANES <= n; i += LANES)
        _mm256_storeu_si256((__m256i *)((uint16_t *)to + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + i)));
    for (; i < n; i++) store_one(to, i, BF16, x[i]);
}
#endif

/* A row of x times the scales of a block row of FP8 weights, in the order that `tile` reads it in. */
static void scale_row(const float *x, const float *scales, int n, int kind, void *to) {
    float *scaled = to;
    int i = 0;
#ifdef FP8_IN_PAIRS
    __m128i *half = to;
    for (; kind == FP8_PAIRS && i + 64 <= n; i += 64, half += 8)
        for (int k = 0; k < 4; k++) {
            __m512 sixteen = _mm512_loadu_ps(x + i + 16 * k) * (scales[i / SCALED] * FP8_FACTOR);
            __m256i both = (__m256i)_mm512_cvtneps_pbh(sixteen);
            _mm_storeu_si128(half + k, _mm256_castsi256_si128(both));
            _mm_storeu_si128(half + 4 + k, _mm256_extracti128_si256(both, 1));
        }
    for (; kind == FP8_PAIRS && i < n; i++) store_one(to, i, BF16, x[i] * (scales[i / SCALED] * FP8_FACTOR));
#endif
    for (; i < n; i++) scaled[i] = x[i] * (scales[i / SCALED] * FP8_FACTOR);
}

/* Weights of FP8: the outputs of a block row have the same scales. They go into x, once for all of them. */
static void matmul_fp8(Matrix w, int from, int to, Rows x, Rows y, int n, int adds, float *scaled) {
    int row_blocks = (w.height + SCALED - 1) / SCALED, column_blocks = (w.n_in + SCALED - 1) / SCALED;
    for (int o = from, end; o < to; y.data += end - o, o = end) {
        int row = o % w.height; /* of one of the matrices, which no range of outputs leaves */
        end = o + SCALED - row % SCALED < to ? o + SCALED - row % SCALED : to;
        const float *scales = w.scales + ((long)(o / w.height) * row_blocks + row / SCALED) * column_blocks;
        for (int r = 0; r < n; r++) scale_row(row_of(x, r), scales, w.n_in, w.kind, scaled + (long)r * w.n_in);
        Rows by_blocks = {scaled, w.n_in};
#ifdef FP8_IN_PAIRS
        if (w.kind == FP8_PAIRS) matmul_kind(w, FP8_PAIRS, o, end, by_blocks, y, n, adds);
        else
#endif
            matmul_kind(w, FP8, o, end, by_blocks, y, n, adds);
    }
}

/* `scratch` is room for n rows of x: in bfloat16, which PAIRS need, or scaled for FP8. */
static void matmul(Matrix w, int from, int to, Rows x, Rows y, int n, int adds, float *scratch) {
    if (from == to) return; /* nothing of it is this thread's */
    if (w.scales) matmul_fp8(w, from, to, x, y, n, adds, scratch);
#ifdef __AVX512BF16__
    else if (w.kind == PAIRS) {
        int stride = (w.n_in + 1) / 2; /* float32 numbers that are as long as a row */
        for (int r = 0; r < n; r++) narrow_row(row_of(x, r), w.n_in, scratch + (long)r * stride);
        matmul_kind(w, PAIRS, from, to, (Rows){scratch, stride}, y, n, adds);
    }
#endif
    else if (w.kind == FP32) matmul_kind(w, FP32, from, to, x, y, n, adds);
    else matmul_kind(w, BF16, from, to, x, y, n, adds);
}

/* RMSNorm.forward */
static void normalize(Norm norm, const float *x, float *y) {
    vec sums = {};
    int i = 0;
    for (; i + LANES <= norm.size; i += LANES) sums += *(const vec *)(x + i) * *(const vec *)(x + i);
    float squares = sum_lanes(sums);
    for (; i < norm.size; i++) squares += x[i] * x[i];
    float factor = 1 / sqrtf(squares / norm.size + norm.eps);
    for (i = 0; i < norm.size; i++) y[i] = x[i] * factor * norm.weight[i];
}

/* --- The layers ------------------------------------------------------------------------------------------------- */

/* How many threads have arrived, how often all had, and whether one was ever awaited for long. */
typedef struct { int arrived, turn, is_late; } Barrier;

/* What the threads share; `h` and what follows is each thread's own. */
typedef struct {
    const Shape *s;
    const Call *c;
    int n, t, threads, longest, is_sparse; /* positions of the longest row; whether one attends to some of them */
    Barrier *barrier;
    float *x;              /* (N, dim), the residual stream */
    float *q_a, *q, *kv;   /* (N, q rank), (N, H, nope + R), (N, C + R) */
    float *queries;        /* (N, H, C + R) */
    float *partials;       /* (threads, N, H, C + 2): sums of values, the largest score, the sum of exponentials */
    float *values;         /* (N, H, v) */
    float *scores;         /* (N, E) */
    float *gate, *up;      /* (N, width of the MLP), and (N·K, width of an expert) after that */
    float *index_q, *index_k, *index_weights; /* (N, heads, index_dim), (N, index_dim), (N, heads) */
    float *index_scores;   /* (N, the longest row's positions) */
    int *selected;         /* (N, index_topk): the positions to attend to, where that is not all */
    float *h;              /* own: (N, dim), or before an MTP module (N, 2 dim); (N, q rank); (C + R); (N, C) */
    float *probs;          /* own: (n_each·H, BLOCK); or (N·K + E) weights, (N·K) sorted by expert, (E) scores */
    float *scratch;        /* own: the rows of a product in bfloat16, or scaled */
    double *released;      /* own: when the last barrier was over, in seconds */
    float *gathered;       /* own: (BLOCK, C + R), of a cache */
    int *chosen;           /* own: (N·K) experts, (N·K) places, (E + 1) ends, (E) flags, (n_groups) flags */
} Step;

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + now.tv_nsec * 1e-9;
}

/* Waits until every thread is here. If that takes far longer than the work did, the thread that is missing has no
   processor, as other programs want it as well: the caller learns of it, since each barrier then takes milliseconds. */
static void wait_for_all(const Step *s) {
    if (s->threads == 1) return;
    double arrived_at = seconds(), patience = 1e-3 + 4 * (arrived_at - *s->released);
    int turn = __atomic_load_n(&s->barrier->turn, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&s->barrier->arrived, 1, __ATOMIC_ACQ_REL) == s->threads) {
        __atomic_store_n(&s->barrier->arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&s->barrier->turn, turn + 1, __ATOMIC_RELEASE);
    }
    for (int tries = 1; __atomic_load_n(&s->barrier->turn, __ATOMIC_ACQUIRE) == turn; tries++) {
        PAUSE();
        if (tries % 1024 || seconds() - arrived_at < patience) continue;
        __atomic_store_n(&s->barrier->is_late, 1, __ATOMIC_RELAXED);
        sched_yield();
    }
    *s->released = seconds();
}

/* Linear.forward: this thread's outputs for all positions, added to y or replacing it. */
static void linear(const Step *s, Matrix w, int outputs, float *x, float *y, int adds) {
    int from = first_of(outputs, s->t, s->threads), to = first_of(outputs, s->t + 1, s->threads);
    matmul(w, from, to, (Rows){x, w.n_in}, (Rows){y + from, outputs}, s->n, adds, s->scratch);
}

/* apply_rotary_emb for one vector: even and odd numbers in (step 2), first and second half out. Or rotate_halves, which
   reads these halves (step 1), where y may be x. */
static void rotate(const Step *s, const float *x, int step, int position, float *y) {
    int half = s->s->rope / 2;
    if (position >= s->s->context) position = s->s->context - 1; /* a draft past the context, which is discarded */
    const float *cos = s->s->cos + (long)position * half, *sin = s->s->sin + (long)position * half;
    for (int i = 0; i < half; i++) {
        float a = x[step * i], b = step == 2 ? x[2 * i + 1] : x[half + i];
        y[i] = a * cos[i] - b * sin[i];
        y[half + i] = b * cos[i] + a * sin[i];
    }
}

/* MLA.forward, KVCache.update: writes position i of the call to the cache, and rotates its queries' rotary part. */
static void write_kv(const Step *s, const Block *b, void *cache, int i) {
    const Shape *a = s->s;
    int width = a->rank + a->rope, position = s->c->positions[i];
    float *kv = s->kv + (long)i * width, *entry = s->h; /* h is free between two norms */
    normalize(b->kv_norm, kv, entry);
    rotate(s, kv + a->rank, 2, position, entry + a->rank);
    long offset = ((long)(i / s->c->n_each) * s->c->capacity + position) * width;
    for (int j = 0; j < width; j++) store_one(cache, offset + j, s->c->kind, entry[j]);
    for (int h = 0; h < a->heads; h++) {
        long head = (long)i * a->heads + h;
        rotate(s, s->q + head * (a->nope + a->rope) + a->nope, 2, position, s->queries + head * width + a->rank);
    }
}

/* o[q] += sum over t of p[q][t] * cache[t], for n queries and so many vectors of columns from i on. */
INLINE void accumulate_columns(const void *cache, int kind, int width, int count, const float *p, float *o,
                               long stride, int n, int vectors, int i) {
    vec sums[ROWS][2];
    for (int q = 0; q < n; q++)
        for (int v = 0; v < vectors; v++) sums[q][v] = *(vec *)(o + q * stride + i + v * LANES);
    for (int t = 0; t < count; t++) {
        vec values[2];
        for (int v = 0; v < vectors; v++) values[v] = load(cache, (long)t * width + i + v * LANES, kind);
        for (int q = 0; q < n; q++)
            for (int v = 0; v < vectors; v++) sums[q][v] += values[v] * p[q * BLOCK + t];
    }
    for (int q = 0; q < n; q++)
        for (int v = 0; v < vectors; v++) *(vec *)(o + q * stride + i + v * LANES) = sums[q][v];
}

#ifdef __AVX512BF16__
/* The same for n queries and 2 LANES columns of PAIRS: two positions at a time, whose numbers of a column are brought
   together. So each quad of a sum holds other columns than its place says, until all is summed. */
INLINE void accumulate_pairs(
    const uint16_t *cache, int width, int count, const float *p, float *o, long stride, int n) {
    vec sums[ROWS][2];
    for (int q = 0; q < n; q++) {
        vec a = *(vec *)(o + q * stride), b = *(vec *)(o + q * stride + LANES);
        sums[q][0] = SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
        sums[q][1] = SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    }
    for (int t = 0; t < count; t += 2) {
        __m512i a = _mm512_loadu_si512(cache + (long)t * width);
        __m512i b = t + 1 < count ? _mm512_loadu_si512(cache + (long)(t + 1) * width) : _mm512_setzero_si512();
        vec low = (vec)_mm512_unpacklo_epi16(a, b), high = (vec)_mm512_unpackhi_epi16(a, b);
        for (int q = 0; q < n; q++) {
            vec weights = (vec)_mm512_set1_epi32(((const int32_t *)(p + q * BLOCK))[t / 2]);
            sums[q][0] = multiply_add(sums[q][0], low, weights, PAIRS);
            sums[q][1] = multiply_add(sums[q][1], high, weights, PAIRS);
        }
    }
    for (int q = 0; q < n; q++) {
        vec a = sums[q][0], b = sums[q][1];
        *(vec *)(o + q * stride) = SHUFFLE(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        *(vec *)(o + q * stride + LANES) = SHUFFLE(a, b, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    }
}
#endif

INLINE void accumulate_rows(const void *cache, int kind, int width, int rank, int count, const float *p, float *o,
                       int n) {
    long stride = rank + 2;
    int i = 0;
#ifdef __AVX512BF16__
    for (; kind == PAIRS && i < rank; i += 2 * LANES)
        accumulate_pairs((const uint16_t *)cache + i, width, count, p, o + i, stride, n);
#endif
    for (; i + 2 * LANES <= rank; i += 2 * LANES)
        accumulate_columns(cache, kind, width, count, p, o, stride, n, 2, i);
    for (; i + LANES <= rank; i += LANES) accumulate_columns(cache, kind, width, count, p, o, stride, n, 1, i);
    for (; i < rank; i++)
        for (int q = 0; q < n; q++)
            for (int t = 0; t < count; t++)
                o[q * stride + i] += p[q * BLOCK + t] * load_one(cache, (long)t * width + i, kind);
}

INLINE void accumulate_kind(
    const void *cache, int kind, int width, int rank, int count, const float *p, float *o, int n) {
    for (int q = 0, more; q < n; q += more, p += more * BLOCK, o += more * (rank + 2)) {
#define ACCUMULATE(n) accumulate_rows(cache, kind, width, rank, count, p, o, more = n)
        if (n - q >= 6) ACCUMULATE(6);
        else if (n - q >= 4) ACCUMULATE(4);
        else if (n - q >= 2) ACCUMULATE(2);
        else ACCUMULATE(1);
    }
}

static void accumulate_values(const void *cache, int kind, int width, int rank, int count, float *p, float *o, int n) {
#ifdef __AVX512BF16__
    if (kind == PAIRS && rank % (2 * LANES) == 0) {
        for (int q = 0; q < n; q++) narrow_row(p + q * BLOCK, BLOCK, p + q * BLOCK);
        accumulate_kind(cache, PAIRS, width, rank, count, p, o, n);
    } else
#endif
    if (kind == FP32) accumulate_kind(cache, FP32, width, rank, count, p, o, n);
    else accumulate_kind(cache, BF16, width, rank, count, p, o, n);
}

/* Softmax of one query over a block of positions: its scores become exponentials, and the sums over the blocks before,
   at `partial`, are scaled to the new maximum. */
static void softmax_block(float *p, int visible, float scale, float *partial, int rank) {
    for (int i = visible; i < BLOCK; i++) p[i] = visible ? -INFINITY : 0;
    if (visible == 0) return; /* it may not look here */
    vec sums = {}, highest = *(vec *)p;
    for (int i = LANES; i < visible; i += LANES)
        highest = select_lanes(*(vec *)(p + i) > highest, *(vec *)(p + i), highest);
    float largest = partial[rank];
    for (int i = 0; i < LANES; i++) largest = highest[i] * scale > largest ? highest[i] * scale : largest;
    for (int i = 0; i < visible; i += LANES) {
        vec values = exp_lanes(*(vec *)(p + i) * scale - largest);
        *(vec *)(p + i) = values;
        sums += values;
    }
    for (int i = visible; i < BLOCK; i++) p[i] = 0;
    float shrink = expf(partial[rank] - largest);
    for (int i = 0; i < rank; i++) partial[i] *= shrink;
    partial[rank] = largest;
    partial[rank + 1] = partial[rank + 1] * shrink + sum_lanes(sums);
}

/* What a cache, `width` numbers a position, has of position t of a row. */
INLINE char *entry_of(const Step *s, const void *cache, int row, int t, int width) {
    return (char *)cache + ((long)row * s->c->capacity + t) * width * size_of(s->c->kind);
}

/* MLA._attend_absorbed and _attend_to_chosen: the heads' queries of `each` positions from the first one on over this
   thread's share of a row of the cache; or of one position, over its share of what is selected for it. */
static void attend(const Step *s, const void *cache, int first, int each, const int *selected) {
    const Shape *a = s->s;
    int rank = a->rank, width = rank + a->rope, queries = each * a->heads, kind = s->c->kind;
    int row = first / s->c->n_each;
    const int32_t *positions = s->c->positions + first;
    float *q = s->queries + (long)first * a->heads * width;
    float *partials = s->partials + ((long)s->t * s->n + first) * a->heads * (rank + 2);
    for (int i = 0; i < queries; i++) {
        memset(partials + (long)i * (rank + 2), 0, (rank + 2) * sizeof *partials);
        partials[(long)i * (rank + 2) + rank] = -INFINITY;
    }
    int length = selected ? a->index_topk : positions[each - 1] + 1, end = first_of(length, s->t + 1, s->threads);
    for (int start = first_of(length, s->t, s->threads); start < end; start += BLOCK) {
        int count = end - start < BLOCK ? end - start : BLOCK;
        char *block = selected ? (char *)s->gathered : entry_of(s, cache, row, start, width);
        long bytes = width * size_of(kind);
        for (int t = 0; t < count && selected; t++)
            memcpy(block + t * bytes, entry_of(s, cache, row, selected[start + t], width), bytes);
        Matrix keys = {.data = block, .kind = kind, .n_in = width};
        matmul(keys, 0, count, (Rows){q, width}, (Rows){s->probs, BLOCK}, queries, 0, s->scratch);
        for (int i = 0; i < queries; i++) {
            int visible = selected ? count : positions[i / a->heads] + 1 - start;
            visible = visible < 0 ? 0 : visible > count ? count : visible;
            softmax_block(s->probs + i * BLOCK, visible, a->scale, partials + (long)i * (rank + 2), rank);
        }
        accumulate_values(block, kind, width, rank, count, s->probs, partials, queries);
    }
}

/* Indexer.forward: normalises, rotates and writes the index key of position i of the call, and rotates its queries. */
static void write_index(const Step *s, const Block *b, void *cache, int i) {
    int size = s->s->index_dim, position = s->c->positions[i];
    float *k = s->index_k + (long)i * size, mean = 0, square = 0;
    for (int j = 0; j < size; j++) mean += k[j] / size;
    for (int j = 0; j < size; j++) square += (k[j] - mean) * (k[j] - mean) / size;
    float factor = 1 / sqrtf(square + b->index_norm.eps);
    for (int j = 0; j < size; j++) k[j] = (k[j] - mean) * factor * b->index_norm.weight[j] + b->index_bias[j];
    rotate(s, k, 1, position, k);
    char *entry = entry_of(s, cache, i / s->c->n_each, position, size);
    for (int j = 0; j < size; j++) store_one(entry, j, s->c->kind, k[j]);
    float *q = s->index_q + (long)i * s->s->index_heads * size;
    for (int h = 0; h < s->s->index_heads && s->is_sparse; h++, q += size) rotate(s, q, 1, position, q);
}

/* index_scores of this thread's keys for position i: each is multiplied by four heads, or copies of one, at a time. */
INLINE void score(const Step *s, const void *cache, int kind, int i) {
    int heads = s->s->index_heads, size = s->s->index_dim, length = s->c->positions[i] + 1;
    int start = first_of(length, s->t, s->threads), end = first_of(length, s->t + 1, s->threads);
    const float *q = s->index_q + (long)i * heads * size, *weights = s->index_weights + (long)i * heads;
    const char *key = entry_of(s, cache, i / s->c->n_each, start, size);
    long bytes = size * size_of(kind);
    for (int t = start; t < end; t++, key += bytes) {
        quad total = {};
        for (long j = 0; j < bytes; j += 64) __builtin_prefetch(key + 32 * bytes + j);
        for (int h = 0; h < heads; h += 4) {
            vec sums[4] = {};
            quad factor;
            const float *of[4];
            int d = 0;
            for (int j = 0; j < 4; j++) of[j] = q + (h + j < heads ? h + j : h) * size;
            for (int j = 0; j < 4; j++) factor[j] = h + j < heads ? weights[h + j] : 0;
            for (; d + LANES <= size; d += LANES) {
                vec numbers = load(key, d, kind);
                for (int j = 0; j < 4; j++) sums[j] += numbers * *(const vec *)(of[j] + d);
            }
            quad four = sum_lanes_of_4(sums[0], sums[1], sums[2], sums[3]);
            for (; d < size; d++)
                for (int j = 0; j < 4; j++) four[j] += load_one(key, d, kind) * of[j][d];
            total += (quad)((four > 0) & (__typeof__(four > 0))four) * factor; /* no loop: it would go through memory */
        }
        s->index_scores[(long)i * s->longest + t] = (total[0] + total[1]) + (total[2] + total[3]);
    }
}

/* Indexer.choose for position i: the best scores, of equal ones the last. Their least is found by bisection, between
   minus infinity and plus, of its bits in an order that is the numbers' own. */
static void choose(const Step *s, int i) {
    const float *scores = s->index_scores + (long)i * s->longest;
    int length = s->c->positions[i] + 1, left = s->s->index_topk, *selected = s->selected + (long)i * left;
    uint32_t low = 0x007fffffu, high = 0xff800001u;
    union { uint32_t bits; float value; } u;
#define NUMBER(ordered) (u.bits = (ordered) >> 31 ? (ordered) ^ 1u << 31 : ~(ordered), u.value)
    for (int count = 0; high - low > 1 && count != left;) {
        uint32_t middle = low + (high - low) / 2;
        float least = NUMBER(middle);
        count = 0;
        for (int t = 0; t < length; t++) count += scores[t] >= least;
        if (count >= left) low = middle;
        else high = middle;
    }
    float least = NUMBER(low);
    for (int t = 0; t < length; t++) left -= scores[t] > least;
    for (int t = length - 1; t >= 0; t--) /* what is no number is chosen where all else is */
        if (scores[t] > least || (!(scores[t] < least) && left-- > 0)) *selected++ = t;
}

/* Merges the threads' partial sums for query i (of N·H) to the mean of the values, (C). */
static void merge_partials(const Step *s, long i, float *mean) {
    int rank = s->s->rank;
    long stride = (long)s->n * s->s->heads * (rank + 2);
    const float *partials = s->partials + i * (rank + 2);
    float largest = -INFINITY, sum = 0;
    for (int t = 0; t < s->threads; t++) largest = fmaxf(largest, partials[t * stride + rank]);
    memset(mean, 0, rank * sizeof *mean);
    for (int t = 0; t < s->threads; t++) {
        const float *partial = partials + t * stride;
        if (partial[rank + 1] == 0) continue; /* it had no positions */
        float factor = expf(partial[rank] - largest);
        sum += factor * partial[rank + 1];
        for (int j = 0; j < rank; j++) mean[j] += factor * partial[j];
    }
    for (int j = 0; j < rank; j++) mean[j] /= sum;
}

/* The two bmm of MLA._attend_absorbed: this thread's outputs of a matrix for each head, `each` outputs a head. x and y
   are (N, H, strides); where x is nothing, the matrices multiply the means of the latents. */
static void linear_heads(const Step *s, Matrix w, int each, float *x, long x_stride, float *y, long y_stride) {
    int heads = s->s->heads, to = first_of(heads * each, s->t + 1, s->threads);
    for (int from = first_of(heads * each, s->t, s->threads), end; from < to; from = end) {
        int head = from / each;
        end = (head + 1) * each < to ? (head + 1) * each : to;
        for (int i = 0; i < s->n && !x; i++) merge_partials(s, (long)i * heads + head, s->h + (long)i * w.n_in);
        Rows in = x ? (Rows){x + head * x_stride, heads * x_stride} : (Rows){s->h, w.n_in};
        Rows out = {y + head * y_stride + from - head * each, heads * y_stride};
        matmul(w, from, end, in, out, s->n, 0, s->scratch);
    }
}

/* Block.forward's first line: MLA.forward under "absorb", added to the residual stream. */
static void attention(const Step *s, const Block *b, void *cache, void *index_cache) {
    const Shape *a = s->s;
    int n = s->n, t = s->t, threads = s->threads, rank = a->rank, heads = a->heads;
    float *h = s->h;
    for (int i = 0; i < n; i++) normalize(b->attn_norm, s->x + (long)i * a->dim, h + (long)i * a->dim);
    linear(s, b->wkv_a, rank + a->rope, h, s->kv, 0);
    if (index_cache) linear(s, b->index_k, a->index_dim, h, s->index_k, 0);
    if (s->is_sparse) linear(s, b->index_weights, a->index_heads, h, s->index_weights, 0);
    if (b->wq_a.data) {
        int q_rank = b->wq_b.n_in;
        linear(s, b->wq_a, q_rank, s->h, s->q_a, 0);
        wait_for_all(s);
        for (int i = 0; i < n; i++) normalize(b->q_norm, s->q_a + (long)i * q_rank, h + (long)i * q_rank);
    }
    linear(s, b->wq_b, heads * (a->nope + a->rope), h, s->q, 0);
    if (s->is_sparse) linear(s, b->index_q, a->index_heads * a->index_dim, h, s->index_q, 0);
    wait_for_all(s);
    for (int i = t; i < n; i += threads) {
        write_kv(s, b, cache, i);
        if (index_cache) write_index(s, b, index_cache, i);
    }
    linear_heads(s, b->w_k, rank, s->q, a->nope + a->rope, s->queries, rank + a->rope);
    wait_for_all(s);
    for (int i = 0; i < n && s->is_sparse; i++)
        if (s->c->kind == FP32) score(s, index_cache, FP32, i);
        else score(s, index_cache, BF16, i);
    if (s->is_sparse) wait_for_all(s);
    for (int i = t; i < n && s->is_sparse; i += threads)
        if (s->c->positions[i] >= a->index_topk) choose(s, i);
    if (s->is_sparse) wait_for_all(s);
    for (int i = 0, each = s->is_sparse ? 1 : s->c->n_each; i < n; i += each) {
        int chooses = s->is_sparse && s->c->positions[i] >= a->index_topk;
        attend(s, cache, i, each, chooses ? s->selected + (long)i * a->index_topk : 0);
    }
    wait_for_all(s);
    linear_heads(s, b->w_v, a->v, 0, 0, s->values, a->v);
    wait_for_all(s);
    linear(s, b->wo, a->dim, s->values, s->x, 1);
    wait_for_all(s);
}

/* MLP.forward: act(gate) * up, by ACTIVATIONS of decode.py. */
static void activate(float *gate, const float *up, int n, int act, float weight) {
    int i = 0;
    if (act == 0) /* silu */
        for (; i + LANES <= n; i += LANES) {
            vec x = *(vec *)(gate + i);
            *(vec *)(gate + i) = x / (exp_lanes(-x) + 1) * *(const vec *)(up + i) * weight;
        }
    for (; i < n; i++) {
        float x = gate[i], positive = x > 0 ? x : 0;
        float y = act == 0   ? x / (1 + expf(-x))
                  : act == 1 ? x * (1 + erff(x * 0.707106781f)) / 2 /* gelu */
                             : positive * positive;                 /* relu2 */
        gate[i] = y * up[i] * weight;
    }
}

/* MLP.forward up to w2, for this thread's hidden units, of an MLP or of expert e: n rows of h, those of `index` or the
   first ones, times their routing weights, if there are any. */
static void mlp_hidden(const Step *s, const Mlp *mlp, int e, const int *index, const float *weights, float *gate,
                   float *up, int n) {
    int width = mlp->width, from = first_of(width, s->t, s->threads), to = first_of(width, s->t + 1, s->threads);
    Rows h = {s->h, s->s->dim, index};
    matmul(mlp->w1, e * width + from, e * width + to, h, (Rows){gate + from, width}, n, 0, s->scratch);
    matmul(mlp->w3, e * width + from, e * width + to, h, (Rows){up + from, width}, n, 0, s->scratch);
    for (int i = 0; i < n; i++) {
        long row = (long)i * width + from;
        activate(gate + row, up + row, to - from, s->s->act, weights ? weights[i] : 1);
    }
}

/* Gate.forward for one position: K experts and their weights. `choice`, `is_chosen` and `is_shut` are scratch. */
static void route(const Shape *a, const float *scores, const float *bias, float *choice, int *is_chosen, int *is_shut,
                   int *experts, float *weights) {
    int n = a->n_experts, per_group = n / a->n_groups;
    float largest = scores[0], sum = 0;
    for (int e = 1; e < n; e++) largest = scores[e] > largest ? scores[e] : largest;
    for (int e = 0; e < n; e++) {
        choice[e] = a->is_softmax ? expf(scores[e] - largest) : 1 / (1 + expf(-scores[e]));
        sum += choice[e];
    }
    for (int e = 0; e < n; e++) {
        weights[e] = a->is_softmax ? choice[e] / sum : choice[e];
        choice[e] = weights[e] + (bias ? bias[e] : 0);
        is_chosen[e] = 0;
    }
    for (int g = 0; g < a->n_groups; g++) is_shut[g] = a->n_limited < a->n_groups;
    for (int i = 0; i < a->n_limited && a->n_limited < a->n_groups; i++) { /* open the best groups */
        int best = -1;
        float best_rank = 0;
        for (int g = 0; g < a->n_groups; g++) {
            float first = -INFINITY, second = -INFINITY;
            for (int e = g * per_group; e < (g + 1) * per_group; e++) {
                if (choice[e] > first) second = first, first = choice[e];
                else if (choice[e] > second) second = choice[e];
            }
            float rank = bias ? first + second : first;
            if (is_shut[g] && (best < 0 || rank > best_rank)) best = g, best_rank = rank;
        }
        is_shut[best] = 0;
    }
    sum = 0;
    for (int i = 0; i < a->n_activated; i++) {
        int best = -1;
        for (int e = 0; e < n; e++)
            if (!is_chosen[e] && !is_shut[e / per_group] && (best < 0 || choice[e] > choice[best])) best = e;
        is_chosen[best] = 1;
        experts[i] = best;
        sum += weights[best];
    }
    for (int i = 0; i < a->n_activated; i++) choice[i] = weights[experts[i]]; /* scores are of no more use */
    float factor = a->route_scale / (a->is_softmax ? 1 : sum + 1e-20f);
    for (int i = 0; i < a->n_activated; i++) weights[i] = choice[i] * factor;
}

/* Block.forward's second line: MLP.forward or MoE.forward, added to the residual stream. */
static void feed_forward(const Step *s, const Block *b) {
    const Shape *a = s->s;
    int n = s->n, n_experts = b->experts.width ? a->n_experts : 0, k = n_experts ? a->n_activated : 0;
    int from = first_of(a->dim, s->t, s->threads), to = first_of(a->dim, s->t + 1, s->threads);
    Rows out = {s->x + from, a->dim};
    for (int i = 0; i < n; i++) normalize(b->ffn_norm, s->x + (long)i * a->dim, s->h + (long)i * a->dim);
    if (b->mlp.width) mlp_hidden(s, &b->mlp, 0, 0, 0, s->gate, s->up, n);
    if (n_experts) linear(s, b->gate, n_experts, s->h, s->scores, 0);
    wait_for_all(s);
    int *experts = s->chosen, *position = experts + n * k, *ends = position + n * k, *flags = ends + n_experts + 1;
    float *weights = s->probs, *sorted = weights + n * k + n_experts, *choice = sorted + n * k;
    for (int i = 0; i < n && n_experts; i++) /* weights has room for a row of scores */
        route(a, s->scores + (long)i * n_experts, b->gate_bias, choice, flags, flags + n_experts, experts + i * k,
               weights + i * k);
    memset(ends, 0, (n_experts + 1) * sizeof *ends);
    for (int i = 0; i < n * k; i++) ends[experts[i] + 1]++;
    for (int e = 0; e < n_experts; e++) ends[e + 1] += ends[e];
    for (int i = 0; i < n * k; i++) { /* ends[e] is where the next position of e goes; afterwards, where they end */
        int offset = ends[experts[i]]++;
        position[offset] = i / k;
        sorted[offset] = weights[i];
    }
    long width = b->experts.width, base = (long)n * b->mlp.width;
    for (int e = 0, start = 0; e < n_experts; start = ends[e++])
        if (ends[e] > start)
            mlp_hidden(s, &b->experts, e, position + start, sorted + start, s->gate + base + start * width,
                   s->up + base + start * width, ends[e] - start);
    if (n_experts) wait_for_all(s);
    if (b->mlp.width) matmul(b->mlp.w2, from, to, (Rows){s->gate, b->mlp.width}, out, n, 1, s->scratch);
    for (int e = 0, start = 0; e < n_experts; start = ends[e++]) {
        out.index = position + start;
        Rows in = {s->gate + base + start * width, width};
        matmul(b->experts.w2, e * a->dim + from, e * a->dim + to, in, out, ends[e] - start, 1, s->scratch);
    }
    wait_for_all(s);
}

/* Transformer.forward_with_hidden and mtp_forward (MTPModule.forward), in one of the threads. */
static void run_thread(const Step *s, const Stack *stack) {
    const Call *c = s->c;
    int dim = s->s->dim, n = s->n;
    float *embedded = stack->eh_proj.data ? s->h : s->x;
    int stride = stack->eh_proj.data ? 2 * dim : dim;
    if (stack->eh_proj.data || s->t == 0)
        for (int i = 0; i < n; i++) {
            float *x = embedded + (long)i * stride;
            for (int j = 0; j < dim; j++) x[j] = load_one(stack->embed.data, c->tokens[i] * dim + j, stack->embed.kind);
            if (stack->eh_proj.data) {
                normalize(stack->enorm, x, x);
                normalize(stack->hnorm, c->before + (long)i * dim, x + dim);
            }
        }
    if (stack->eh_proj.data) linear(s, stack->eh_proj, dim, s->h, s->x, 0);
    wait_for_all(s);
    for (int i = 0; i < stack->n_blocks; i++) {
        attention(s, stack->blocks + i, c->kv_caches[i], c->index_caches ? c->index_caches[i] : 0);
        feed_forward(s, stack->blocks + i);
    }
    for (int i = s->t; i < n; i += s->threads) normalize(stack->norm, s->x + (long)i * dim, c->states + (long)i * dim);
    wait_for_all(s);
    linear(s, stack->head, s->s->vocab, c->states, c->logits, 0);
}

static long largest(long a, long b) { return a > b ? a : b; }

/* Allocates `count` numbers from the arena, in whole cache lines. */
static float *allocate(float **from, long count) {
    float *start = *from;
    *from += (count + 15) / 16 * 16;
    return start;
}

/* Runs the layers of a stack and the head on a call. Returns 0, or -1 if a thread had to wait for its processor; 1 if
   there is not enough memory, 2 for a token out of range. */
int run(const Shape *a, const Stack *stack, const Call *c) {
    long n = (long)c->n_rows * c->n_each, width = a->rank + a->rope, q_rank = 1, units = 1, h_width = 2L * a->dim;
    long longest = 1;
    for (long i = 0; i < n; i++) {
        if (c->tokens[i] < 0 || c->tokens[i] >= a->vocab) return 2;
        longest = largest(longest, c->positions[i] + 1);
    }
    for (int i = 0; i < stack->n_blocks; i++) {
        const Block *b = stack->blocks + i;
        if (b->wq_a.data) q_rank = largest(q_rank, b->wq_b.n_in);
        units = largest(units, b->mlp.width + (long)a->n_activated * b->experts.width);
    }
    h_width = largest(largest(h_width, width), q_rank);
    long widest = largest(largest(h_width, units), largest((long)a->heads * a->v, a->nope)); /* of a product's rows */
    long scratch = largest(n * widest, c->n_each * a->heads * ((width + 1) / 2));
    long scored = a->index_topk && longest > a->index_topk ? n : 0;
    long heads = a->heads, gathered = scored ? BLOCK * width : 0;
    long probs = largest(c->n_each * heads * BLOCK, 2 * n * a->n_activated + 2L * a->n_experts);
    long chosen = 2 * n * a->n_activated + 2L * a->n_experts + 1 + a->n_groups;
    Barrier barrier = {0, 0, 0};
    Step step = {.s = a, .c = c, .n = (int)n, .threads = 1, .longest = (int)longest, .is_sparse = scored > 0,
        .barrier = &barrier};
    struct { float **at; long count; } shared[] = {
        {&step.x, n * a->dim}, {&step.q_a, n * q_rank}, {&step.q, n * heads * (a->nope + a->rope)},
        {&step.kv, n * width}, {&step.queries, n * heads * width}, {&step.values, n * heads * a->v},
        {&step.partials, c->threads * n * heads * (a->rank + 2)}, {&step.scores, n * a->n_experts},
        {&step.gate, n * units}, {&step.up, n * units}, {&step.index_q, n * a->index_heads * a->index_dim},
        {&step.index_k, n * a->index_dim}, {&step.index_weights, n * a->index_heads},
        {&step.index_scores, scored * longest}, {(float **)&step.selected, scored * a->index_topk}};
    int n_shared = sizeof shared / sizeof *shared;
    long count = 16 * 20, each = (n * h_width + probs + scratch + gathered + chosen + 96) / 16 * 16; /* lines */
    for (int i = 0; i < n_shared; i++) count += shared[i].count;
    float *arena = malloc((count + each * c->threads) * sizeof *arena);
    float *rest = (float *)(((uintptr_t)arena + 63) / 64 * 64);
    if (!arena) return 1;
    for (int i = 0; i < n_shared; i++) *shared[i].at = allocate(&rest, shared[i].count);
#ifdef _OPENMP
#pragma omp parallel num_threads(c->threads)
#endif
    {
        Step mine = step;
#ifdef _OPENMP
        mine.t = omp_get_thread_num();
        mine.threads = omp_get_num_threads();
#endif
        float *own = rest + mine.t * each;
        double released = seconds();
        mine.released = &released;
        mine.h = allocate(&own, n * h_width);
        mine.probs = allocate(&own, probs);
        mine.scratch = allocate(&own, scratch);
        mine.gathered = allocate(&own, gathered);
        mine.chosen = (int *)allocate(&own, chosen);
        run_thread(&mine, stack);
    }
    free(arena);
    return barrier.is_late ? -1 : 0;
}
