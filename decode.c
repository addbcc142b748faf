/* The model for a few positions at a time on a CPU: compiled and called by decode.py.

The mathematics is model.py's under "absorb": names are those of its modules, and the comment of a function names the
one that it computes. decode.py compares the two when a model is loaded, so change both. Sums are in float32.

Decoding reads every weight that a byte needs for two operations on it, so it is as fast as memory if nothing else takes
time: no calls between operations, no copies, no thread that waits. One call of `run` does all layers and the head.
Threads go through the layers side by side. Each computes some outputs of a product, so it reads its own rows of the
    weights, for all positions at once; then they wait for each other. What is small each computes for itself instead.
Experts are visited one after the other, each by the positions that are routed to it, so that it is read once.
The KV cache is divided among threads by positions. Each attends to its own, with the softmax's maximum and sum carried
    along; these sums are then merged (Milakov and Gimelshein 2018; Dao et al. 2023, "Flash-Decoding").

Shapes: N positions of the call, `n_rows` rows of `n_each`; H heads; C `kv_lora_rank`; R `qk_rope_head_dim`; K experts a
position, of E. */

#include <math.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

/* A tile of a product, up to OUTPUTS x ROWS sums of LANES numbers each, fits the registers. QUADS are for SHUFFLE: four
   numbers of a quad of its first vector and the same of the other (from LANES on), alike in every quad. */
#define TWO_QUADS(i, j, k, l) i, j, k, l, i + 4, j + 4, k + 4, l + 4
#if defined(__AVX512F__)
#define LANES 16
#define HALF_TILE 4 /* outputs of a tile of many rows */
#define QUADS(i, j, k, l) TWO_QUADS(i, j, k, l), TWO_QUADS(i + 8, j + 8, k + 8, l + 8)
#elif defined(__AVX2__)
#define LANES 8
#define HALF_TILE 2 /* it has 16 registers, not 32 */
#define QUADS TWO_QUADS
#else
#define LANES 4 /* NEON; to GCC, longer vectors there are numbers one by one */
#define HALF_TILE 4
#define QUADS(i, j, k, l) i, j, k, l
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
#ifdef __x86_64__
#define PAUSE() __builtin_ia32_pause()
#else
#define PAUSE() (void)0
#endif
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float pairs __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
typedef float quad __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef int32_t unaligned __attribute__((aligned(1), may_alias));
typedef uint16_t shorts __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

/* --- What decode.py fills in, field by field ------------------------------------------------------------------- */

/* How a matrix is stored and multiplied. PAIRS are stored as BF16 are, but the other side is rounded to bfloat16, too,
   where the processor has an instruction for the sum of two such products; FP8_PAIRS are FP8 with that other side. */
enum { FP32, BF16, PAIRS, FP8, FP8_PAIRS };

typedef struct {
    const void *data;     /* (outputs, n_in), row by row */
    const float *scales;  /* of FP8's blocks: (outputs / height, height / SCALED, n_in / SCALED), rounded up */
    int32_t kind, n_in, height; /* height: outputs of one of the matrices below each other */
} Matrix;

typedef struct { const float *weight; float eps; int32_t size; } Norm;

/* Of routed experts: one matrix below the other. `width` is that of one, 0 if there is none. */
typedef struct { Matrix w1, w2, w3; int32_t width; } Mlp;

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
#else
    return (vec)(__builtin_convertvector(*(const shorts *)at, words) << 16);
#endif
}

INLINE float load_one(const void *data, long i, int kind) {
    if (kind == FP32) return ((const float *)data)[i];
    int is_fp8 = size_of(kind) == 1;
    union { uint32_t bits; float value; } wide = {is_fp8 ? (uint32_t)((const int8_t *)data)[i] << 20 & 0x87f00000
                                                         : (uint32_t)((const uint16_t *)data)[i] << 16};
    return is_fp8 ? wide.value * 0x1p112f : wide.value;
}

/* Four numbers, or eight of BF16, in every quad. */
INLINE ints load_quad(const void *at) {
#if defined(__AVX512F__)
    return (ints)_mm512_broadcast_i32x4(_mm_loadu_si128(at));
#elif defined(__AVX2__)
    return (ints)_mm256_broadcastsi128_si256(_mm_loadu_si128(at));
#else
    return (ints)*(const pairs *)at;
#endif
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

INLINE float sum_lanes(vec a) { return sum_quads(a)[0] + sum_quads(a)[1] + sum_quads(a)[2] + sum_quads(a)[3]; }

/* Of each quad, the sums of its four numbers in a, b, c and d. */
INLINE vec sum_in_quads(vec a, vec b, vec c, vec d) {
    vec ab = SHUFFLE(a, b, QUADS(0, LANES, 1, LANES + 1)) + SHUFFLE(a, b, QUADS(2, LANES + 2, 3, LANES + 3));
    vec cd = SHUFFLE(c, d, QUADS(0, LANES, 1, LANES + 1)) + SHUFFLE(c, d, QUADS(2, LANES + 2, 3, LANES + 3));
    return SHUFFLE(ab, cd, QUADS(0, 1, LANES, LANES + 1)) + SHUFFLE(ab, cd, QUADS(2, 3, LANES + 2, LANES + 3));
}

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
    return t == threads ? all : (int)((int64_t)all * t / threads / OUTPUTS * OUTPUTS);
}

/* --- Products --------------------------------------------------------------------------------------------------- */

typedef struct { float *data; long stride; const int *index; } Rows; /* which rows, or nothing: the first ones */

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
/* The two bytes in bfloat16 of e4m3's numbers from 0 on, 2^-8 times as large. */
static uint8_t low_bytes[128], high_bytes[128];

static __attribute__((constructor)) void fill_tables(void) {
    for (int i = 0; i < 128; i++) {
        int8_t code = i;
        union { float value; uint8_t bytes[4]; } u = {load_one(&code, 0, FP8)};
        low_bytes[i] = u.bytes[2], high_bytes[i] = u.bytes[3];
    }
}

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
        quad four = sum_quads(sum_in_quads(SUM(k), SUM(k + 1), SUM(k + 2), SUM(k + 3)));
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
    int *best, *n_best;    /* likewise, each thread's best positions; and (N, threads), how many there are */
    float *h;              /* own: (N, dim), or before an MTP module (N, 2 dim); (N, q rank); (C + R); (N, C) */
    float *probs;          /* own: (n_each·H, BLOCK); or (N·K + E) weights, (N·K) by expert, (E + n_groups) scores */
    float *scratch;        /* own: a product's rows in bfloat16, or scaled; an indexer's queries; candidates */
    double *released;      /* own: when the last barrier was over, in seconds */
    float *gathered;       /* own: (BLOCK, C + R), of a cache */
    int *selected;         /* own: (index_topk), the positions to attend to, where that is not all */
    int *chosen;           /* own: (N·K + E) experts, (N·K) positions by expert, (E) ends of each expert's */
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
    for (long head = (long)i * a->heads; head < (i + 1L) * a->heads; head++)
        rotate(s, s->q + head * (a->nope + a->rope) + a->nope, 2, position, s->queries + head * width + a->rank);
}

/* o[q] += sum over t of p[q][t] * cache[t], for n queries and 2 LANES columns from i on. PAIRS of two positions
   are made, so that each quad of a sum holds other columns than its place says, until the end. */
INLINE void accumulate_columns(const void *cache, int kind, int width, int count, const float *p, float *o,
                               long stride, int n, int i) {
    vec sums[ROWS][2] = {};
    for (int t = 0; t < count; t += kind == PAIRS ? 2 : 1) {
        vec values[2];
#ifdef __AVX512BF16__
        if (kind == PAIRS) {
            const uint16_t *at = (const uint16_t *)cache + (long)t * width + i;
            __m512i a = _mm512_loadu_si512(at), b = {};
            if (t + 1 < count) b = _mm512_loadu_si512(at + width);
            values[0] = (vec)_mm512_unpacklo_epi16(a, b), values[1] = (vec)_mm512_unpackhi_epi16(a, b);
        } else
#endif
            for (int v = 0; v < 2; v++) values[v] = load(cache, (long)t * width + i + v * LANES, kind);
        for (int q = 0; q < n; q++) {
            vec pair = (vec)((ints){} + ((const int32_t *)(p + q * BLOCK))[t / 2]);
            for (int v = 0; v < 2; v++)
                if (kind == PAIRS) sums[q][v] = multiply_add(sums[q][v], values[v], pair, PAIRS);
                else sums[q][v] += values[v] * p[q * BLOCK + t];
        }
    }
    for (int q = 0; q < n; q++) {
        vec a = sums[q][0], b = sums[q][1], *to = (vec *)(o + q * stride + i);
#if LANES == 16
        if (kind == PAIRS) {
            a = SHUFFLE(sums[q][0], b, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
            b = SHUFFLE(sums[q][0], b, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
        }
#endif
        to[0] += a, to[1] += b;
    }
}

INLINE void accumulate_rows(const void *cache, int kind, int width, int rank, int count, const float *p, float *o,
                            int n) {
    long stride = rank + 2, i = 0;
    for (; i + 2 * LANES <= rank; i += 2 * LANES) accumulate_columns(cache, kind, width, count, p, o, stride, n, i);
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
    const int32_t *positions = s->c->positions + first, row = first / s->c->n_each;
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
        for (int t = 0; t < count && selected; t++) {
            const char *later = entry_of(s, cache, row, selected[start + (t + 8 < count ? t + 8 : t)], width);
            for (long j = 0; j < bytes; j += 64) __builtin_prefetch(later + j);
            memcpy(block + t * bytes, entry_of(s, cache, row, selected[start + t], width), bytes);
        }
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

/* index_scores of `count` keys for position i, four at a time: a quad of a vector belongs to one of the heads. */
INLINE void score(const Step *s, const char *keys, int kind, int i, int count, float *scores) {
    int n_heads = s->s->index_heads, size = s->s->index_dim, heads = LANES / 4, bytes = size * (int)size_of(kind);
    int per_quad = kind == FP32 ? 4 : 8, quads = (size + per_quad - 1) / per_quad;
    int vectors = kind == BF16 ? 2 * quads : quads, groups = (n_heads + heads - 1) / heads;
    vec *queries = (vec *)s->scratch, *weights = queries + groups * vectors;
    char *padded = (char *)(weights + groups);
    memset(queries, 0, padded + 4 * 16 * quads - (char *)queries);
    for (int h = 0; h < n_heads; h++) {
        vec *q = queries + h / heads * vectors;
        int lane = h % heads * 4;
        for (int d = 0; d < size; d++) {
            float x = s->index_q[((long)i * n_heads + h) * size + d];
            if (kind == PAIRS) store_one(q + d / 8, 2 * lane + d % 8, BF16, x);
            else if (kind == BF16) ((float *)(q + d / 8 * 2 + d % 2))[lane + d % 8 / 2] = x; /* even ones, odd ones */
            else ((float *)(q + d / 4))[lane + d % 4] = x;
        }
        *(quad *)((float *)(weights + h / heads) + lane) = (quad){} + s->index_weights[(long)i * n_heads + h];
    }
    for (int t = 0; t < count; t += 4) {
        const char *four = keys + (long)t * bytes;
        int stride = bytes;
        if (bytes % 16 || count - t < 4) { /* nothing after the keys is read */
            for (int k = 0; k < 4 && t + k < count; k++) memcpy(padded + k * 16 * quads, four + k * bytes, bytes);
            four = padded, stride = 16 * quads;
        }
        for (int j = 0; j < 4 * bytes; j += 64) __builtin_prefetch(four + 32 * bytes + j);
        vec total = {};
        for (int g = 0; g < groups; g++) {
            vec sums[4] = {}, *q = queries + g * vectors;
            for (int j = 0; j < quads; j++)
                for (int k = 0; k < 4; k++) {
                    ints key = load_quad(four + k * stride + 16 * j);
                    if (kind != BF16) sums[k] = multiply_add(sums[k], (vec)key, q[j], kind);
                    else sums[k] += (vec)(key << 16) * q[2 * j], sums[k] += (vec)(key & -0x10000) * q[2 * j + 1];
                }
            vec products = sum_in_quads(sums[0], sums[1], sums[2], sums[3]);
            total += select_lanes(products > 0, products, (vec){}) * weights[g];
        }
        *(quad *)(scores + t) = sum_quads(total);
    }
}

/* The indices of the best scores, in order: `left` or more, up to `most`; if equal ones are too many, the last. Their
   least is found by bisection, between minus infinity and plus, of its bits in an order that is the numbers' own. */
static int choose(const float *scores, int count, int left, int most, int *chosen) {
    uint32_t low = 0x007fffffu, high = 0xff800001u;
    union { uint32_t bits; float value; } u;
#define NUMBER(ordered) (u.bits = (ordered) >> 31 ? (ordered) ^ 1u << 31 : ~(ordered), u.value)
    int more = 0, n = 0, t = 0;
    for (; count <= most && t < count; t++) chosen[t] = t;
    if (count <= most) return count;
    while ((more < left || more > most) && high - low > 1) {
        uint32_t middle = low + (high - low) / 2;
        float least = NUMBER(middle);
        more = 0;
        for (int i = 0; i < count; i++) more += scores[i] >= least;
        if (more < left) high = middle;
        else low = middle;
    }
    float least = NUMBER(low);
    if (more < left || more > most) { /* what is no number is chosen where all else is */
        for (int i = 0; i < count; i++) n += scores[i] > least;
        for (int i = count - 1, slot = left; slot > 0; i--)
            if (scores[i] > least || (!(scores[i] < least) && n++ < left)) chosen[--slot] = i;
        return left;
    }
#ifdef __AVX512F__
    for (ints at = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; t + 16 <= count; t += 16, at += 16) {
        __mmask16 are_best = _mm512_cmp_ps_mask(_mm512_loadu_ps(scores + t), _mm512_set1_ps(least), _CMP_GE_OQ);
        _mm512_storeu_si512(chosen + n, _mm512_maskz_compress_epi32(are_best, (__m512i)at));
        n += __builtin_popcount(are_best);
    }
#endif
    for (; t < count; t++) chosen[n] = t, n += scores[t] >= least;
    return n;
}

/* Indexer.choose for position i among this thread's positions: their scores, and the best, more than are needed. */
static __attribute__((noinline)) void choose_own(const Step *s, const void *cache, int i) { /* it needs the registers */
    int length = s->c->positions[i] + 1, start = first_of(length, s->t, s->threads), topk = s->s->index_topk;
    int count = first_of(length, s->t + 1, s->threads) - start, *best = s->best + (long)i * s->longest + start;
    float *scores = s->index_scores + (long)i * s->longest + start;
    const char *keys = entry_of(s, cache, i / s->c->n_each, start, s->s->index_dim);
    if (s->c->kind == FP32) score(s, keys, FP32, i, count, scores);
#ifdef __AVX512BF16__
    else if (s->c->kind == PAIRS) score(s, keys, PAIRS, i, count, scores);
#endif
    else score(s, keys, BF16, i, count, scores);
    count = choose(scores, count, topk, 2 * topk, best);
    for (int j = 0; j < count; j++) scores[j] = scores[best[j]], best[j] += start;
    s->n_best[i * s->threads + s->t] = count;
}

/* Indexer.choose for position i: the best of all threads' best positions. */
static const int *choose_of_all(const Step *s, int i) {
    int length = s->c->positions[i] + 1, topk = s->s->index_topk, count = 0;
    int *positions = (int *)s->scratch + 2 * topk * s->threads;
    for (int t = 0; t < s->threads; t++) {
        int more = s->n_best[i * s->threads + t];
        long from = (long)i * s->longest + first_of(length, t, s->threads);
        memcpy(s->scratch + count, s->index_scores + from, more * sizeof(float));
        memcpy(positions + count, s->best + from, more * sizeof(int));
        count += more;
    }
    choose(s->scratch, count, topk, topk, s->selected);
    for (int j = 0; j < topk; j++) s->selected[j] = positions[s->selected[j]];
    return s->selected;
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
        float factor = expf(partial[rank] - largest); /* 0 if it had no positions */
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
        if (s->c->positions[i] >= a->index_topk) choose_own(s, index_cache, i);
    if (s->is_sparse) wait_for_all(s);
    for (int i = 0, each = s->is_sparse ? 1 : s->c->n_each; i < n; i += each)
        attend(s, cache, i, each, s->is_sparse && s->c->positions[i] >= a->index_topk ? choose_of_all(s, i) : 0);
    wait_for_all(s);
    linear_heads(s, b->w_v, a->v, 0, 0, s->values, a->v);
    wait_for_all(s);
    linear(s, b->wo, a->dim, s->values, s->x, 1);
    wait_for_all(s);
}

/* MLP.forward: act(gate) * up, by ACTIVATIONS of decode.py. */
static void activate(float *gate, const float *up, int n, int act, float weight) {
    int i = 0;
    for (; act == 0 && i + LANES <= n; i += LANES) { /* silu */
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

/* Gate.forward for one position: K experts and their weights. `choice` and `open` are scratch. */
static void route(const Shape *a, const float *scores, const float *bias, float *choice, int *open, int *experts,
                  float *weights) {
    int n = a->n_experts, per_group = n / a->n_groups;
    float largest = scores[0], sum = 0, *ranks = choice + n;
    for (int e = 1; e < n; e++) largest = scores[e] > largest ? scores[e] : largest;
    for (int e = 0; e < n; e++) {
        weights[e] = a->is_softmax ? expf(scores[e] - largest) : 1 / (1 + expf(-scores[e]));
        sum += weights[e];
    }
    for (int e = 0; e < n; e++) {
        weights[e] = a->is_softmax ? weights[e] / sum : weights[e];
        choice[e] = weights[e] + (bias ? bias[e] : 0);
    }
    for (int g = 0; g < a->n_groups; g++) {
        float first = -INFINITY, second = -INFINITY;
        for (int e = g * per_group; e < (g + 1) * per_group; e++) {
            if (choice[e] > first) second = first, first = choice[e];
            else if (choice[e] > second) second = choice[e];
        }
        ranks[g] = bias ? first + second : first;
    }
    int n_open = choose(ranks, a->n_groups, a->n_limited, a->n_limited, open);
    for (int e = 0, i = 0; e < n; e++) { /* of the best groups only */
        if (i < n_open && e / per_group > open[i]) i++;
        if (i == n_open || e / per_group != open[i]) choice[e] = -INFINITY;
    }
    choose(choice, n, a->n_activated, a->n_activated, experts);
    sum = 0;
    for (int i = 0; i < a->n_activated; i++) sum += choice[i] = weights[experts[i]]; /* which weights replace */
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
    int *experts = s->chosen, *position = experts + n * k + n_experts, *ends = position + n * k;
    float *weights = s->probs, *sorted = weights + n * k + n_experts, *choice = sorted + n * k;
    for (int i = 0; i < n && n_experts; i++) /* experts and weights have room for a row of scores */
        route(a, s->scores + (long)i * n_experts, b->gate_bias, choice, ends, experts + i * k, weights + i * k);
    for (int e = 0, offset = 0; e < n_experts; ends[e++] = offset)
        for (int i = 0; i < n * k; i++)
            if (experts[i] == e) position[offset] = i / k, sorted[offset++] = weights[i];
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

/* Allocates `count` numbers from the arena, in whole cache lines. */
static float *allocate(float **from, long count) {
    float *start = *from;
    *from += (count + 15) / 16 * 16;
    return start;
}

/* Transformer.forward_with_hidden and mtp_forward (MTPModule.forward), in one of the threads. */
static void run_thread(Step mine, const Stack *stack, float *own, const long *counts) {
    double released = seconds();
    float **arrays[] = {&mine.h, &mine.probs, &mine.scratch, &mine.gathered, (float **)&mine.selected,
                        (float **)&mine.chosen};
    for (int i = 0; i < 6; i++) *arrays[i] = allocate(&own, counts[i]);
    mine.released = &released;
    const Step *s = &mine;
    const Call *c = s->c;
    int dim = s->s->dim, n = s->n, is_mtp = stack->eh_proj.data != 0, stride = is_mtp ? 2 * dim : dim;
    for (int i = 0; i < n && (is_mtp || s->t == 0); i++) {
        float *x = (is_mtp ? s->h : s->x) + (long)i * stride;
        for (int j = 0; j < dim; j++) x[j] = load_one(stack->embed.data, c->tokens[i] * dim + j, stack->embed.kind);
        if (!is_mtp) continue;
        normalize(stack->enorm, x, x);
        normalize(stack->hnorm, c->before + (long)i * dim, x + dim);
    }
    if (is_mtp) linear(s, stack->eh_proj, dim, s->h, s->x, 0);
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

/* Runs the threads. Returns what `run` does. */
static int run_threads(Step step, const Stack *stack, long q_rank, long units) {
    const Shape *a = step.s;
    const Call *c = step.c;
    long n = step.n, heads = a->heads, width = a->rank + a->rope, k = a->n_activated, scored = step.is_sparse ? n : 0;
    long h_width = largest(largest(2L * a->dim, width), q_rank);
    long widest = largest(largest(h_width, units), largest(heads * a->v, a->nope)); /* of a product's rows */
    long scratch = largest(n * widest, c->n_each * heads * ((width + 1) / 2)), topk = scored ? a->index_topk : 0;
    scratch = largest(scratch, largest(4 * topk * c->threads, (a->index_heads + 9L) * (a->index_dim + 12)));
    struct { float **at; long count; } shared[] = {
        {&step.x, n * a->dim}, {&step.q_a, n * q_rank}, {&step.q, n * heads * (a->nope + a->rope)},
        {&step.kv, n * width}, {&step.queries, n * heads * width}, {&step.values, n * heads * a->v},
        {&step.partials, c->threads * n * heads * (a->rank + 2)}, {&step.scores, n * a->n_experts},
        {&step.gate, n * units}, {&step.up, n * units}, {&step.index_q, n * a->index_heads * a->index_dim},
        {&step.index_k, n * a->index_dim}, {&step.index_weights, n * a->index_heads},
        {&step.index_scores, scored * step.longest}, {(float **)&step.best, scored * step.longest},
        {(float **)&step.n_best, scored * c->threads}};
    long own[] = {n * h_width, largest(c->n_each * heads * BLOCK, 2 * (n * k + a->n_experts) + a->n_groups), scratch,
                  scored ? BLOCK * width : 0, topk + LANES, 2 * (n * k + a->n_experts)};
    int n_shared = sizeof shared / sizeof *shared, n_own = sizeof own / sizeof *own;
    long count = 16, each = 16; /* whole cache lines */
    for (int i = 0; i < n_shared; i++) count += (shared[i].count + 15) / 16 * 16;
    for (int i = 0; i < n_own; i++) each += (own[i] + 15) / 16 * 16;
    float *arena = malloc((count + each * c->threads) * sizeof *arena);
    float *rest = (float *)(((uintptr_t)arena + 63) / 64 * 64);
    if (!arena) return 1;
    for (int i = 0; i < n_shared; i++) *shared[i].at = allocate(&rest, shared[i].count);
    Barrier barrier = {0, 0, 0};
    step.barrier = &barrier;
#pragma omp parallel num_threads(c->threads) /* passed over by compilers that have no OpenMP */
    {
        Step mine = step;
#ifdef _OPENMP
        mine.t = omp_get_thread_num();
        mine.threads = omp_get_num_threads();
#endif
        run_thread(mine, stack, rest + mine.t * each, own);
    }
    free(arena);
    return barrier.is_late ? -1 : 0;
}

/* Runs the layers of a stack and the head on a call. Returns 0, or -1 if a thread had to wait for its processor; 1 if
   there is not enough memory, 2 for a token out of range. */
int run(const Shape *a, const Stack *stack, const Call *c) {
    long n = (long)c->n_rows * c->n_each, longest = 1, q_rank = 1, units = 1;
    for (long i = 0; i < n; i++) {
        if (c->tokens[i] < 0 || c->tokens[i] >= a->vocab) return 2;
        longest = largest(longest, c->positions[i] + 1);
    }
    for (int i = 0; i < stack->n_blocks; i++) {
        const Block *b = stack->blocks + i;
        if (b->wq_a.data) q_rank = largest(q_rank, b->wq_b.n_in);
        units = largest(units, b->mlp.width + (long)a->n_activated * b->experts.width);
    }
    Step step = {.s = a, .c = c, .n = (int)n, .threads = 1, .longest = (int)(longest + 3) / 4 * 4,
                 .is_sparse = a->index_topk && longest > a->index_topk};
    return run_threads(step, stack, q_rank, units);
}
