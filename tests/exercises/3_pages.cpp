// SPDX-License-Identifier: Apache-2.0
//
// Exercise 3: what a token sees, read back from the pages. `./dev exercise 3`
//
// A tool for whoever debugs the cache: read_kv_kernel copies the keys and values of one row out of
// the pages of a layer, in order of position. It must go through the row's table of the right pool,
// touch nothing behind the window (the table says -1 there, or somebody else may have the page by
// now), and undo the transposition of V. Some ten lines.
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
    // Yours. Attention::page and Tables::page, and the comment above Tables, have what you need.
}

constexpr int G = 2, E = 64, layers = 2, window = 40, R = 2, table_pages = 4;
constexpr size_t layer_size = size_t(G) * 2 * page_tokens * E, page_size = layers * layer_size;
constexpr uint16_t nan_bits = 0xffff;

// One pool, whose page -1 is there too and full of NaN, as are all places that nobody has filled.
struct Memory_ {
    std::vector<bf16> bytes = std::vector<bf16>(8 * page_size, bf16{nan_bits});
    bf16* page(int id) { return bytes.data() + size_t(id + 1) * page_size; }
};

bf16 stored(int row, int layer, int position, int g, int d, bool is_value) {
    const int n = ((((row * layers + layer) * 128 + position) * G + g) * E + d) * 2 + is_value;
    return {uint16_t(n * 2654435761u >> 18)};  // 14 bits: positive, small, and no NaN
}

// Tables of two rows that share page 5, positions 0..31. In the local pool row 1 has let go of it.
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
    CHECK(wrong[0] == 0);  // of K
    CHECK(wrong[1] == 0);  // of V
    CHECK(unseen == 0);    // of what must be zeros
}

}  // namespace

TEST_CASE("global layers: everything from the start, in shared pages too") {
    for (const int row : {0, 1}) check(global_pool, row, 1);
}

TEST_CASE("local layers: the window and nothing behind it") {
    for (const int row : {0, 1}) check(local_pool, row, row);
}
