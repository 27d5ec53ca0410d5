// SPDX-License-Identifier: Apache-2.0
//
// Exercise 3: read back from the pages the K and V that a token sees. `./dev exercise 3`
//
// read_kv_kernel is a tool for debugging the KV cache: it copies the keys and values of one row out
// of the pages of a layer, in order of position. It must use the row's table of the right pool,
// read nothing before the window (there the table has -1, or a page that another row may own by
// now), and undo the transposition of V. Write some ten lines.
#include "exercise.h"

using namespace gemma;

namespace {

// keys[g, p, :] and values[g, p, :] = K and V of position p; zeros where the token at position
// `last` does not see p.
// Grid: (last + 1, G), E threads.
__global__ void read_kv_kernel([[maybe_unused]] Attention a, [[maybe_unused]] int row,
                               [[maybe_unused]] int last,
                               [[maybe_unused]] bf16* keys,      // [G, last + 1, E]
                               [[maybe_unused]] bf16* values) {  // [G, last + 1, E]
    // Write this. You need Attention::page, Tables::page and the comment above Tables.
}

constexpr int G = 2, E = 64, layers = 2, window = 40, R = 2, table_pages = 4;
constexpr size_t layer_size = size_t(G) * 2 * page_tokens * E, page_size = layers * layer_size;
constexpr uint16_t nan_bits = 0xffff;

// One pool. All places that fill() does not write are NaN, and so is a page -1, which exists here.
struct Memory_ {
    std::vector<bf16> bytes = std::vector<bf16>(8 * page_size, bf16{nan_bits});
    bf16* page(int id) { return bytes.data() + size_t(id + 1) * page_size; }
};

bf16 stored(int row, int layer, int position, int g, int d, bool is_value) {
    const int n = ((((row * layers + layer) * 128 + position) * G + g) * E + d) * 2 + is_value;
    return {uint16_t(n * 2654435761u >> 18)};  // 14 bits: positive, small, never NaN
}

// Tables of two rows that share page 5, positions 0..31. In the local pool row 1 has released it.
const int local[R][table_pages] = {{5, 0, -1, -1}, {-1, 3, 1, -1}};
const int global[R][table_pages] = {{5, 2, -1, -1}, {5, 4, 0, -1}};
constexpr int lasts[R] = {50, 80};

void fill(Memory_& memory, const int (&table)[R][table_pages]) {
    for (int row = 0; row < R; row++) {
        for (int p = 0; p <= lasts[row]; p++) {
            const int id = table[row][p / page_tokens], owner = p < page_tokens ? 0 : row;
            if (id < 0) continue;
            for (int i = 0; i < layers * G * E; i++) {
                const int layer = i / (G * E), g = i / E % G, d = i % E;
                bf16* at =
                    memory.page(id) + size_t(layer) * layer_size + size_t(g) * 2 * page_tokens * E;
                at[p % page_tokens * E + d] = stored(owner, layer, p, g, d, false);
                at[page_tokens * E + d * page_tokens + p % page_tokens] =
                    stored(owner, layer, p, g, d, true);
            }
        }
    }
}

void check(Pool pool, int row, int layer) {
    Memory_ memory;
    fill(memory, pool == local_pool ? local : global);
    std::vector<PagePair> pages(size_t(table_pages * R));
    for (int i = 0; i < table_pages; i++) {
        for (int r = 0; r < R; r++) pages[size_t(i * R + r)] = {local[r][i], global[r][i]};
    }
    Attention a{};
    a.tables.pages = pages.data(), a.tables.R = R;
    a.kv = memory.page(0) + size_t(layer) * layer_size, a.page_stride = page_size;
    a.pool = pool, a.window = pool == local_pool ? window : INT_MAX;
    a.G = G, a.H = G, a.E = E;
    const int last = lasts[row], count = last + 1;
    const size_t size = size_t(G * count * E);
    const auto both = in_all_orders([&] {
        std::vector<bf16> out(2 * size, bf16{0xaaaa});
        gemma::Stream s;
        s.launch("read_kv", 0, read_kv_kernel, dim3(unsigned(count), G), E, 0, a, row, last,
                 out.data(), out.data() + size);
        return out;
    });
    int wrong[2] = {0, 0}, unseen = 0;
    for (int i = 0; i < int(size); i++) {
        const int g = i / (count * E), p = i / E % count, d = i % E;
        const bool seen = pool == global_pool || p > last - window;
        const int owner = p < page_tokens ? 0 : row;
        for (const bool is_value : {false, true}) {
            const bf16 want = seen ? stored(owner, layer, p, g, d, is_value) : bf16{0};
            const bool right = both[is_value * size + size_t(i)].bits == want.bits;
            (seen ? wrong[is_value] : unseen) += !right;
        }
    }
    INFO("pool " << pool << ", row " << row << ", layer " << layer << "; so many are wrong:");
    CHECK(wrong[0] == 0);  // elements of K
    CHECK(wrong[1] == 0);  // elements of V
    CHECK(unseen == 0);    // elements that must be zero and are not
}

}  // namespace

TEST_CASE("global layers: everything from the start, in shared pages too") {
    for (const int row : {0, 1}) check(global_pool, row, 1);
}

TEST_CASE("local layers: the window and nothing behind it") {
    for (const int row : {0, 1}) check(local_pool, row, row);
}
