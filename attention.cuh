// SPDX-License-Identifier: Apache-2.0
//
// attention.cuh: softmax(scale q K^T) V over the pages of K and V. Sitting 2; included by gemma.cu.
// Twin: attend in reference.cpp.
//
//   A page holds 32 tokens: for each layer of its pool and each KV head, K [32, E] and then V
//   transposed, [E, 32]. Rows of both are the mma's columns, by the same 16-byte loads as weights.
//
//   Keys are cut into chunks of 64 on the grid of absolute positions, two pages a chunk. Each chunk
//   is computed from zero, and chunks are folded in order:
//
//     position   0        64        128       192      256
//                |--------|---------|---------|---------|
//     window:             .   [==== W keys of the token ====]   masked keys of a chunk weigh 0
//     chunk          (top, sum, out)  (top, sum, out)  ..      top: the highest score
//                         `---------- Fold ----------'
//
//   A row of one token (decode):  a block takes one chunk and writes its numbers; merge_kernel
//                                 folds them.
//   A row of several (prefill):   a block takes a tile of tokens, walks their chunks and folds
//   them.
//
// Both ways give the same bits, because a chunk's numbers depend on its 64 keys alone. A maximum
// that is carried from one chunk into the next would round the next one by keys that a block of a
// decode step has not seen.
#pragma once

#include <climits>
#include <cmath>

#include "machine.cuh"

namespace gemma {
namespace {

constexpr int chunk_keys = 64;
constexpr int most_slots = 16384;  // chunks whose numbers have room in memory at a time

// [1] Tables --------------------------------------------------------------------------------------

struct alignas(8) PagePair {  // one load
    int local, global;        // ids of pages; -1: not there
};

// The step's tables, on the device.
struct Tables {
    const int *tokens, *positions, *row_of;  // [N]
    const int* row_start;                    // [R+1]
    // A row of one token attends chunk by chunk: it has the chunks chunk_start[pool][r] ..
    // chunk_start[pool][r+1]-1. A longer row attends in tiles: tile_start[r] .. tile_start[r+1]-1.
    const int *chunk_start[2], *tile_start;  // [R+1]
    const int* output_token;                 // [outputs]
    // [pages][R], not [R][pages]: a graph knows R, so no address in the table depends on the length
    // of the longest row.
    const PagePair* pages;
    int R;

    __device__ int page(int pool, int row, int i) const {
        const PagePair both = pages[size_t(i) * R + row];
        return pool == global_pool ? both.global : both.local;
    }
};

struct Attention {
    Tables tables;
    const bf16* qkv;               // [N, (H + 2G) E]
    const bf16 *q_norm, *k_norm;   // [E]
    const float* cos_sin;          // [N, E], of the pool
    bf16* kv;                      // this layer's place in page 0
    size_t page_stride;            // bf16s from a page to the next
    int pool, window, H, G, E, N;  // window: INT_MAX for global layers
    float eps, scale;              // scale: of scores, with log2 e
    float* chunk_out;              // [slots][H][E]
    float2* chunk_sums;            // [slots][H]: {maximum, sum of weights}
    bf16* out;                     // [N, H E] in fragment order

    __device__ bf16* page(int id, int kv_head) const {
        return kv + id * page_stride + size_t(kv_head) * 2 * page_tokens * E;
    }
    // Head i of token n: H of queries, then G of keys, then G of values.
    __device__ const bf16* head(int n, int i) const {
        return qkv + (size_t(n) * (H + 2 * G) + i) * E;
    }
    __device__ int first_chunk(int position) const {
        return max(0, position - window + 1) / chunk_keys;
    }
};

// [2] K and V go to their pages -------------------------------------------------------------------

// One head of q or k by a warp: rmsnorm over the head, then RoPE, which turns x[d] and x[d + E/2]
// by their angle. The result goes, a pair at a time, to store(d, pair). Twins: rmsnorm_row,
// rope_row
template <int E, class StorePair>
__device__ inline void norm_rope(const bf16* head, const bf16* weight, const float* cos_sin,
                                 float eps, StorePair store) {
    constexpr int pairs = E / 64;  // of a lane
    const int d0 = int(threadIdx.x) % 32 * 2 * pairs, angle = d0 % (E / 2);
    uint32_t in[pairs], w[pairs];
    float x[2 * pairs], c[2 * pairs], s[2 * pairs], squares = 0;
    copy<pairs * 4>(in, head + d0);
    copy<pairs * 4>(w, weight + d0);
    copy<pairs * 8>(c, cos_sin + angle);
    copy<pairs * 8>(s, cos_sin + E / 2 + angle);
    UNROLL for (int i = 0; i < pairs; i++) {
        x[2 * i] = low(in[i]);
        x[2 * i + 1] = high(in[i]);
    }
    UNROLL for (int i = 0; i < 2 * pairs; i++) { squares += x[i] * x[i]; }
    const float r = rsqrtf(warp_sum(squares) / float(E) + eps);
    UNROLL for (int i = 0; i < 2 * pairs; i++) {
        x[i] = x[i] * r * (1 + (i % 2 ? high(w[i / 2]) : low(w[i / 2])));
        const float other = __shfl_xor_sync(~0u, x[i], 16);  // x[d + E/2] or x[d - E/2]
        x[i] = d0 < E / 2 ? fmaf(x[i], c[i], -(other * s[i])) : fmaf(x[i], c[i], other * s[i]);
    }
    UNROLL for (int i = 0; i < pairs; i++) { store(d0 + 2 * i, pack_bf16(x[2 * i], x[2 * i + 1])); }
}

// Writes k of token n, normed and turned, to its page, and to `also` [E] if that is not null. By a
// warp. Twin: qk_norm_rope_write
template <int E>
__device__ inline void write_k(const Attention& a, int n, int row, int kv_head, bf16* also) {
    const int position = a.tables.positions[n];
    const int id = a.tables.page(a.pool, row, position / page_tokens);
    bf16* k = a.page(max(id, 0), kv_head) + position % page_tokens * E;
    norm_rope<E>(a.head(n, a.H + kv_head), a.k_norm, a.cos_sin + size_t(n) * E, a.eps,
                 [&](int d, uint32_t pair) {
                     if (id >= 0) *reinterpret_cast<uint32_t*>(k + d) = pair;
                     if (also) *reinterpret_cast<uint32_t*>(also + d) = pair;
                 });
}

// Writes v of `count` tokens of a row, from n on; 32 dims from d on, by a warp. Count is 1, or 8
// tokens at positions 8i .. 8i+7, which lie in one page and are one store of 16 bytes.
template <int count>
__device__ inline void write_v(const Attention& a, int n, int row, int kv_head, int d) {
    const int lane = int(threadIdx.x) % 32, position = a.tables.positions[n];
    const int id = a.tables.page(a.pool, row, position / page_tokens);
    bf16* to = a.page(max(id, 0), kv_head) + page_tokens * a.E + (d + lane) * page_tokens;
    to += position % page_tokens;
    uint32_t v[count];  // all loads before the store
    UNROLL for (int i = 0; i < count; i++) {
        v[i] = a.head(n + i, a.H + a.G + kv_head)[d + lane].bits;
    }
    if (id < 0) return;
    if constexpr (count == 8) {
        *reinterpret_cast<uint4*>(to) = {v[0] | v[1] << 16, v[2] | v[3] << 16, v[4] | v[5] << 16,
                                         v[6] | v[7] << 16};
    } else {
        UNROLL for (int i = 0; i < count; i++) { to[i].bits = uint16_t(v[i]); }
    }
}

// Writes k and v of rows of several tokens. A row of one token writes its own in
// attend_chunk_kernel, which saves a kernel in each layer. In a page of V the tokens of one dim are
// neighbours, so eight tokens are stored at once. Grid: (eight tokens, KV heads).
template <int E>
__global__ void __launch_bounds__(256) write_kv_kernel(Attention a) {
    const int warp = int(threadIdx.x) / 32, kv_head = int(blockIdx.y);
    const int first = int(blockIdx.x) * 8, last = min(first + 7, a.N - 1), n = first + warp;
    launch_dependents();
    const int row = a.tables.row_of[min(n, last)];
    const bool long_row = a.tables.row_start[row + 1] - a.tables.row_start[row] > 1;
    const bool eight = last == first + 7 && a.tables.positions[first] % 8 == 0 &&
                       a.tables.row_of[first] == a.tables.row_of[last];
    grid_dependency_wait();
    if (n > last || !long_row) return;
    write_k<E>(a, n, row, kv_head, nullptr);
    if (eight) {
        if (warp < E / 32) write_v<8>(a, first, row, kv_head, warp * 32);
    } else {
        for (int d = 0; d < E; d += 32) write_v<1>(a, n, row, kv_head, d);
    }
}

// Index of the row r with start[r] <= item < start[r+1]: counts the rows whose end is <= item.
// Every warp computes it. start: [rows+1].
__device__ inline int find_row(const int* start, int rows, int item) {
    const int lane = int(threadIdx.x) % 32;
    int row = 0;
    for (int first = 0; first < rows; first += 32) {  // all 32 lanes take part in each ballot
        const int r = first + lane;
        row += __popc(__ballot_sync(~0u, r < rows && start[r + 1] <= item));
    }
    return row;
}

// [3] One chunk -----------------------------------------------------------------------------------

// Folds chunks into a result, in order: total = total * old + chunk * fresh. Both kernels call it,
// so both round alike.
struct Fold {
    static constexpr float masked = -1;  // as `old`: the row sees no key of the chunk
    float top = -INFINITY, sum = 0, old = 0, fresh = 0;

    __device__ void add(float chunk_top, float chunk_sum) {
        if (chunk_top == -INFINITY) {
            old = masked;
            return;
        }
        const float higher = fmaxf(top, chunk_top);
        old = exp2f(top - higher);
        fresh = exp2f(chunk_top - higher);
        sum = apply(sum, chunk_sum);
        top = higher;
    }
    __device__ float apply(float total, float chunk) const {
        return old == masked ? total : total * old + chunk * fresh;
    }
};

struct ChunkPages {
    int first, second;  // of a chunk's two pages; -1: not there, or no key of it is needed
};

// A block's view of its query rows: row i is head i % heads of token n0 + i / heads.
struct Queries {
    int n0, tokens, heads, row, position;  // position: of n0
};

// The attention of 16 MT query rows (tokens by the heads that share a KV head) to chunks of 64
// keys, each computed from zero: scores, their maximum, weights 2^(score - maximum), their sum by
// tiles of 8 keys, and the product with V. Warps divide the keys for the scores, and the dims for
// the product. Twin: attend
template <int E, int MT, int WARPS>
struct Tile {
    static constexpr int rows = 16 * MT, key_tiles = 8 / WARPS, dim_tiles = E / 8 / WARPS;
    static constexpr size_t shared =
        MT * (E / 32 + 2) * 1024 + (WARPS + 8) * rows * sizeof(float) + rows * sizeof(Fold) + 2 * E;
    bf16* q;      // [MT][E/32][512], fragment order
    bf16* p;      // [MT][2][512]
    float* tops;  // [WARPS][rows]
    float* sums;  // [8][rows]
    Fold* folds;  // [rows]
    bf16* new_k;  // [E]
    int warp, lane, g, t;
    uint4 k[key_tiles][E / 32], v[dim_tiles][2];
    float scores[MT][key_tiles][4], out[MT][dim_tiles][4];

    __device__ __forceinline__ Tile() {
        q = reinterpret_cast<bf16*>(dynamic_shared()), p = q + MT * E / 32 * 512;
        tops = reinterpret_cast<float*>(p + MT * 2 * 512), sums = tops + WARPS * rows;
        folds = reinterpret_cast<Fold*>(sums + 8 * rows);
        new_k = reinterpret_cast<bf16*>(folds + rows);
        warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
    }

    __device__ __forceinline__ void load_queries(const Attention& a, const Queries& m,
                                                 int kv_head) {
        for (int i = warp; i < m.tokens * m.heads; i += WARPS) {
            const int n = m.n0 + i / m.heads, head = kv_head * m.heads + i % m.heads;
            norm_rope<E>(a.head(n, head), a.q_norm, a.cos_sin + size_t(n) * E, a.eps,
                         [&](int d, uint32_t pair) {
                             *reinterpret_cast<uint32_t*>(q + fragment(i, d, E)) = pair;
                         });
        }
    }

    __device__ __forceinline__ ChunkPages pages_of(const Attention& a, const Queries& m,
                                                   int chunk) const {
        const int last = m.position + m.tokens - 1;
        return {a.tables.page(a.pool, m.row, chunk * 2),
                chunk * chunk_keys + page_tokens <= last
                    ? a.tables.page(a.pool, m.row, chunk * 2 + 1)
                    : -1};
    }

    __device__ __forceinline__ void load_keys(const Attention& a, ChunkPages ids, int kv_head) {
        const int key = warp * 8 * key_tiles, id = key < page_tokens ? ids.first : ids.second;
        const bf16* from = a.page(max(id, 0), kv_head) + (key % page_tokens + g) * E + t * 8;
        UNROLL for (int j = 0; j < key_tiles; j++) {
            UNROLL for (int i = 0; i < E / 32; i++) {
                k[j][i] = id >= 0 ? load_stream(from + j * 8 * E + i * 32) : uint4{};
            }
        }
    }

    // Keys outside lo..hi are masked for all rows. Their weights are 0, but their bytes may be
    // anything, and 0 * NaN is NaN: so their values become 0 here.
    __device__ __forceinline__ void load_values(const Attention& a, ChunkPages ids, int kv_head,
                                                int chunk, int lo, int hi) {
        UNROLL for (int b = 0; b < 2; b++) {
            const int id = b ? ids.second : ids.first,
                      key = chunk * chunk_keys + b * page_tokens + t * 8;
            const bf16* from = a.page(max(id, 0), kv_head) + page_tokens * E +
                               (warp * dim_tiles * 8 + g) * page_tokens + t * 8;
            uint32_t keep[4];
            for (int i = 0; i < 4; i++) {
                const int first = key + 2 * i;
                keep[i] = (first >= lo && first <= hi ? 0xffffu : 0) |
                          (first + 1 >= lo && first + 1 <= hi ? 0xffff0000u : 0);
            }
            UNROLL for (int d = 0; d < dim_tiles; d++) {
                const uint4 x = id >= 0 ? load_stream(from + d * 8 * page_tokens) : uint4{};
                v[d][b] = {x.x & keep[0], x.y & keep[1], x.z & keep[2], x.w & keep[3]};
            }
        }
    }

    // load_keys ran before this token's k was in its page. Overwrites that key's registers with the
    // fresh k from shared memory.
    __device__ __forceinline__ void patch_key(int key) {
        UNROLL for (int j = 0; j < key_tiles; j++) {
            if (key / 8 != warp * key_tiles + j || key % 8 != g) continue;
            UNROLL for (int i = 0; i < E / 32; i++) { k[j][i] = load16(new_k + i * 32 + t * 8); }
        }
    }

    // The scores of one chunk, and each row's maximum over this warp's keys.
    __device__ __forceinline__ void score(const Attention& a, const Queries& m, int chunk) {
        UNROLL for (int r = 0; r < MT; r++) {
            UNROLL for (int j = 0; j < key_tiles; j++) {
                float(&c)[4] = scores[r][j];
                c[0] = c[1] = c[2] = c[3] = 0;
                UNROLL for (int i = 0; i < E / 32; i++) {
                    const bf16* at = q + (r * (E / 32) + i) * 512 + (g * 4 + t) * 8;
                    mma_half(c, load16(at), k[j][i].x, k[j][i].y);
                    mma_half(c, load16(at + 256), k[j][i].z, k[j][i].w);
                }
            }
            UNROLL for (int half = 0; half < 2; half++) {
                const int i = r * 16 + g + half * 8, position = m.position + i / m.heads;
                float top = -INFINITY;
                UNROLL for (int j = 0; j < key_tiles; j++) {
                    UNROLL for (int e = 2 * half; e < 2 * half + 2; e++) {
                        const int key =
                            chunk * chunk_keys + (warp * key_tiles + j) * 8 + 2 * t + e % 2;
                        float& c = scores[r][j][e];
                        c = key <= position && key > position - a.window ? c * a.scale : -INFINITY;
                        top = fmaxf(top, c);
                    }
                }
                top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
                top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
                if (t == 0) tops[warp * rows + i] = top;
            }
        }
    }

    // The weights p of one chunk and their sums, in shared memory. Ends in a barrier.
    __device__ __forceinline__ void soften() {
        UNROLL for (int r = 0; r < MT; r++) {
            UNROLL for (int half = 0; half < 2; half++) {
                const int i = r * 16 + g + half * 8;
                const float top = row_top(i), base = top == -INFINITY ? 0 : top;
                UNROLL for (int j = 0; j < key_tiles; j++) {
                    const int tile = warp * key_tiles + j;
                    const float(&c)[4] = scores[r][j];
                    const uint32_t pair =
                        pack_bf16(exp2f(c[2 * half] - base), exp2f(c[2 * half + 1] - base));
                    *reinterpret_cast<uint32_t*>(
                        p + r * 1024 + fragment(i % 16, tile * 8 + 2 * t, chunk_keys)) = pair;
                    float sum = low(pair) + high(pair);
                    sum += __shfl_xor_sync(~0u, sum, 1);
                    sum += __shfl_xor_sync(~0u, sum, 2);
                    if (t == 0) sums[tile * rows + i] = sum;
                }
            }
        }
        __syncthreads();
    }

    __device__ __forceinline__ float row_top(int i) const {
        float top = tops[i];
        UNROLL for (int w = 1; w < WARPS; w++) { top = fmaxf(top, tops[w * rows + i]); }
        return top;
    }
    __device__ __forceinline__ float row_sum(int i) const {
        float sum = sums[i];
        UNROLL for (int tile = 1; tile < 8; tile++) { sum += sums[tile * rows + i]; }
        return sum;
    }

    // out = p V of one chunk, from zero.
    __device__ __forceinline__ void multiply() {
        UNROLL for (int r = 0; r < MT; r++) {
            UNROLL for (int d = 0; d < dim_tiles; d++) {
                out[r][d][0] = out[r][d][1] = out[r][d][2] = out[r][d][3] = 0;
            }
            UNROLL for (int b = 0; b < 2; b++) {
                const bf16* at = p + (r * 2 + b) * 512 + (g * 4 + t) * 8;
                const uint4 a0 = load16(at), a1 = load16(at + 256);
                UNROLL for (int d = 0; d < dim_tiles; d++) {
                    mma_half(out[r][d], a0, v[d][b].x, v[d][b].y);
                    mma_half(out[r][d], a1, v[d][b].z, v[d][b].w);
                }
            }
        }
    }

    __device__ __forceinline__ void store_part(const Attention& a, const Queries& m, int kv_head,
                                               int slot) const {
        const size_t at = size_t(slot) * a.H + kv_head * m.heads;
        UNROLL for (int d = 0; d < dim_tiles; d++) {
            float* to = a.chunk_out + (at + g) * E + (warp * dim_tiles + d) * 8 + 2 * t;
            const float(&c)[4] = out[0][d];
            if (g < m.heads) *reinterpret_cast<float2*>(to) = make_float2(c[0], c[1]);
            if (g + 8 < m.heads) *reinterpret_cast<float2*>(to + 8 * E) = make_float2(c[2], c[3]);
        }
        const int i = int(threadIdx.x);
        if (i < m.heads) a.chunk_sums[at + i] = make_float2(row_top(i), row_sum(i));
    }

    __device__ __forceinline__ void add_to(float (&total)[MT][dim_tiles][4]) const {
        UNROLL for (int r = 0; r < MT; r++) {
            UNROLL for (int i = 0; i < 4; i++) {
                const Fold& fold = folds[r * 16 + g + i / 2 * 8];
                UNROLL for (int d = 0; d < dim_tiles; d++) {
                    total[r][d][i] = fold.apply(total[r][d][i], out[r][d][i]);
                }
            }
        }
    }

    __device__ __forceinline__ void store(const Attention& a, const Queries& m, int kv_head,
                                          const float (&total)[MT][dim_tiles][4]) const {
        UNROLL for (int r = 0; r < MT; r++) {
            UNROLL for (int half = 0; half < 2; half++) {
                const int i = r * 16 + g + half * 8, n = m.n0 + i / m.heads;
                const int head = kv_head * m.heads + i % m.heads;
                if (i >= m.tokens * m.heads) continue;
                const float sum = folds[i].sum;
                UNROLL for (int d = 0; d < dim_tiles; d++) {
                    const float(&c)[4] = total[r][d];
                    const int at = head * E + (warp * dim_tiles + d) * 8 + 2 * t;
                    *reinterpret_cast<uint32_t*>(a.out + fragment(n, at, a.H * E)) =
                        pack_bf16(c[2 * half] / sum, c[2 * half + 1] / sum);
                }
            }
        }
    }
};

// [4] The kernels ---------------------------------------------------------------------------------

// A block takes one chunk after the other, each of a row of one token, and writes its numbers,
// which merge_kernel folds. The row's older keys were written by earlier steps, so they are loaded
// before the wait; the block with the newest chunk writes the row's own k and v, and puts k where
// it was loaded too early. Grid: (chunks, KV heads).
template <int E, int WARPS>
__global__ void __launch_bounds__(WARPS * 32, 3)
    attend_chunk_kernel(Attention a, int first_row, int rows) {
    Tile<E, 1, WARPS> tile;
    const int* start = a.tables.chunk_start[a.pool] + first_row;
    const int chunks = start[rows] - start[0], kv_head = int(blockIdx.y);
    launch_dependents();
    for (int slot = int(blockIdx.x); slot < chunks; slot += int(gridDim.x)) {
        const int r = find_row(start, rows, start[0] + slot), row = first_row + r;
        Queries m{a.tables.row_start[row], 1, a.H / a.G, row, 0};
        m.position = a.tables.positions[m.n0];
        const int chunk = a.first_chunk(m.position) + start[0] + slot - start[r];
        const ChunkPages ids = tile.pages_of(a, m, chunk);
        tile.load_keys(a, ids, kv_head);
        grid_dependency_wait();
        const bool newest = chunk == m.position / chunk_keys;
        if (newest && tile.warp == WARPS - 1) write_k<E>(a, m.n0, row, kv_head, tile.new_k);
        for (int d = 32 * tile.warp; newest && d < E; d += 32 * WARPS)
            write_v<1>(a, m.n0, row, kv_head, d);
        tile.load_queries(a, m, kv_head);
        __syncthreads();
        if (newest) tile.patch_key(m.position % chunk_keys);
        tile.score(a, m, chunk);
        tile.load_values(a, ids, kv_head, chunk, m.position - a.window + 1, m.position);
        __syncthreads();
        tile.soften();
        tile.multiply();
        tile.store_part(a, m, kv_head, slot);
    }
    // Blocks without a chunk exit at once, so they free their SM. One block waits for the kernel
    // before, so that the grid never completes before it.
    if (blockIdx.x == 0) grid_dependency_wait();
}

// A block takes a tile of a row's tokens and folds all its chunks itself; write_kv_kernel has
// written the row's k and v. Grid: (tiles, KV heads), the longest tiles first.
template <int E, int MT, int WARPS>
__global__ void __launch_bounds__(WARPS * 32) attend_tile_kernel(Attention a) {
    Tile<E, MT, WARPS> tile;
    const int* start = a.tables.tile_start;
    const int index = start[a.tables.R] - 1 - int(blockIdx.x), kv_head = int(blockIdx.y);
    launch_dependents();
    const int row = find_row(start, a.tables.R, index), per_tile = tile.rows / (a.H / a.G);
    Queries m{a.tables.row_start[row], 0, a.H / a.G, row, 0};
    m.n0 += (index - start[row]) * per_tile;
    m.tokens = min(per_tile, a.tables.row_start[row + 1] - m.n0);
    m.position = a.tables.positions[m.n0];
    const int last_key = m.position + m.tokens - 1, first_key = m.position - a.window + 1;
    const int first = a.first_chunk(m.position), last = last_key / chunk_keys;
    ChunkPages ids = tile.pages_of(a, m, first);
    grid_dependency_wait();
    tile.load_queries(a, m, kv_head);
    float total[MT][tile.dim_tiles][4] = {};
    if (threadIdx.x < tile.rows) tile.folds[threadIdx.x] = {};
    __syncthreads();
    tile.load_keys(a, ids, kv_head);
    for (int chunk = first; chunk <= last; chunk++) {  // loads go ahead of what needs them
        tile.score(a, m, chunk);
        tile.load_values(a, ids, kv_head, chunk, first_key, last_key);
        __syncthreads();
        tile.soften();
        if (threadIdx.x < tile.rows)
            tile.folds[threadIdx.x].add(tile.row_top(threadIdx.x), tile.row_sum(threadIdx.x));
        tile.multiply();
        __syncthreads();
        if (chunk < last) {
            ids = tile.pages_of(a, m, chunk + 1);
            tile.load_keys(a, ids, kv_head);
        }
        tile.add_to(total);
    }
    tile.store(a, m, kv_head, total);
}

// Folds the chunks of a row of one token, in order; four dims a thread, two where E is 64. Eight
// chunks are loaded while eight are folded, since each load costs a latency. Grid: (heads, rows).
template <int E>
__global__ void __launch_bounds__(64) merge_kernel(Attention a, int first_row) {
    constexpr int dims = E >= 128 ? 4 : 2, flying = 8;
    const int row = first_row + int(blockIdx.y), head = int(blockIdx.x);
    launch_dependents();
    const int* start = a.tables.chunk_start[a.pool];
    const int chunks = start[row + 1] - start[row], slot = start[row] - start[first_row];
    const int n = a.tables.row_start[row], d = int(threadIdx.x) * dims;
    grid_dependency_wait();
    if (chunks == 0) return;
    struct Parts {
        float out[flying][dims];
        float2 sums[flying];
    } now, next;
    const auto fetch = [&](Parts& parts, int first) {
        UNROLL for (int i = 0; i < flying; i++) {
            if (first + i >= chunks) continue;
            const size_t at = size_t(slot + first + i) * a.H + head;
            parts.sums[i] = a.chunk_sums[at];
            copy<dims * 4>(parts.out[i], a.chunk_out + at * E + d);
        }
    };
    float total[dims] = {};
    Fold fold;
    fetch(now, 0);
    for (int first = 0; first < chunks; first += flying) {
        fetch(next, first + flying);
        UNROLL for (int i = 0; i < flying; i++) {
            if (first + i >= chunks) break;
            fold.add(now.sums[i].x, now.sums[i].y);
            UNROLL for (int j = 0; j < dims; j++) {
                total[j] = fold.apply(total[j], now.out[i][j]);
            }
        }
        now = next;
    }
    for (int j = 0; j < dims; j += 2) {
        bf16* to = a.out + fragment(n, head * E + d + j, a.H * E);
        *reinterpret_cast<uint32_t*>(to) = pack_bf16(total[j] / fold.sum, total[j + 1] / fold.sum);
    }
}

// [5] Launchers -----------------------------------------------------------------------------------

template <class Function>
void with_head_width(int E, Function function) {
    if (E == 256) return function(std::integral_constant<int, 256>());
    if (E == 128) return function(std::integral_constant<int, 128>());
    assert(E == 64);
    function(std::integral_constant<int, 64>());
}

void write_kv(Stream& s, const Attention& a) {
    with_head_width(a.E, [&](auto E) {
        s.launch("write_kv", 8. * a.N * a.G * E, write_kv_kernel<E>, dim3(ceil_div(a.N, 8), a.G),
                 256, 0, a);
    });
}

// Rows of one token among first_row .. first_row + rows - 1, with `chunks` chunks in all.
void attend_rows(Stream& s, const Attention& a, int first_row, int rows, int chunks) {
    assert(chunks <= most_slots && a.H / a.G <= 16);
    // Enough blocks for every chunk of the window, or for 2,048 tokens a row: a graph serves rows
    // of any length, and where there are more chunks a block takes several.
    const int most = (a.window - 2) / chunk_keys + 2;  // chunks that a window can touch
    const int blocks = a.window < INT_MAX ? std::min(rows * most, most_slots)
                                          : std::clamp(rows * 32, 4 * s.processors, most_slots);
    const double bytes = 4. * chunk_keys * a.E * a.G * chunks;
    with_head_width(a.E, [&](auto E) {
        using Shape = Tile<E, 1, 4>;
        s.launch("attention", bytes, attend_chunk_kernel<E, 4>, dim3(blocks, a.G), 128,
                 Shape::shared, a, first_row, rows);
        s.launch("merge", 4. * a.H * a.E * chunks, merge_kernel<E>, dim3(a.H, rows),
                 std::max(32, E / 4), 0, a, first_row);
    });
}

constexpr int query_rows = 64;  // of a tile: tokens by the heads that share a KV head

void attend_tiles(Stream& s, const Attention& a, int tiles) {
    assert(a.H / a.G <= 16);
    with_head_width(a.E, [&](auto E) {
        using Shape = Tile<E, query_rows / 16, 8>;
        s.launch("attention of tiles", 4. * chunk_keys * a.E * a.G * tiles,
                 attend_tile_kernel<E, query_rows / 16, 8>, dim3(tiles, a.G), 256, Shape::shared,
                 a);
    });
}

}  // namespace
}  // namespace gemma
