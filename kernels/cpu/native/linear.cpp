#include "linear.h"

#include <algorithm>
#include <atomic>
#include <string.h>

namespace guanaco {
namespace {

// Rows that are multiplied with one decoded tile at a time: enough that decoding is 2 % of the work, few enough that
// their sums stay in the first-level cache.
constexpr int64_t kBlockRows = 128;
// Bytes of weights in a task, for one row. 64 and 128 KiB were as fast.
constexpr int64_t kTaskBytes = 256 << 10;
// Tiles that are computed together, so that the kernels can read several of them side by side (nf4_tile.h).
constexpr int64_t kTilesOfOneRow = 8, kTilesOfFewRows = 4, kFewRows = 5;
constexpr int64_t kShrinkRows = 32, kShrinkRanks = 16;  // of one task of shrink()

int64_t element_bytes(int32_t dtype) { return dtype == kFloat32 ? 4 : 2; }

int64_t bytes_of_tile(const Linear& w) {
    if (w.kind == kNf4Tiled) return tile_bytes(w.k / kGroup);
    // A flat tile is decoded element by element: as much work as dense float32.
    return kTileRows * w.k * (w.kind == kDense ? element_bytes(w.dtype) : 4);
}

// Tasks 0 … count − 1 in one range per thread. A thread runs its own range in order, so that it prefetches its own next
// task, and then helps with the other ranges.
class Ranges {
  public:
    Ranges(Arena& arena, int threads, int64_t count) : ranges_(arena.take<Range>(threads)), threads_(threads) {
        for (int t = 0; t < threads; t++) {
            new (&ranges_[t]) Range{{count * t / threads}, count * (t + 1) / threads};
        }
    }
    // The next task of `thread`. Called `count` times in all, so it always finds one: all ranges are empty only after
    // `count` tasks were given out, each of them once.
    int64_t draw(int thread) {
        for (int t = thread;; t = t + 1 == threads_ ? 0 : t + 1) {
            Range& range = ranges_[t];
            if (range.next.load(std::memory_order_relaxed) >= range.end) continue;
            int64_t task = range.next.fetch_add(1, std::memory_order_relaxed);
            if (task < range.end) return task;
        }
    }

  private:
    struct alignas(64) Range {
        std::atomic<int64_t> next;
        int64_t end;
    };
    Range* ranges_;
    int threads_;
};

// A thread's memory to compute blocks of a product.
struct Scratch {
    float* y;  // [kBlockRows][16]
    float* other;  // the same, for SwiGLU's second product
    float* delta;  // the same, for LoRA's
    const float** rows;  // [kBlockRows]
    float* decoded;  // [16][k] for flat weights
};

// y[tile][m][0 … 16) for rows first … first + rows − 1 and `count` neighbouring tiles, without bias and LoRA.
void tile_products(const Kernels& k, const Linear& w, const Activations& x, int64_t tile, int64_t count, int64_t first,
                   int64_t rows, const Scratch& s, float* y) {
    if (w.kind == kNf4Tiled) {
        int64_t groups = w.k / kGroup;
        k.nf4_tiles(w.data + tile * tile_bytes(groups), count, groups, x.integers + first * kGroup, x.factors + first,
                    x.rows, rows, y);
        return;
    }
    for (int64_t m = 0; m < rows; m++) s.rows[m] = x.x + (first + m) * w.k;
    for (; count > 0; count--, tile++, y += rows * kTileRows) {
        int64_t n0 = tile * kTileRows, n = std::min<int64_t>(kTileRows, w.n - n0);
        if (w.kind == kDense) {
            const uint8_t* data = w.data + n0 * w.k * element_bytes(w.dtype);
            k.dense_tile(data, w.dtype, n, w.k, s.rows, rows, y, kTileRows);
        } else {
            k.decode_flat(w.data, w.scales, n0 * w.k, n * w.k, s.decoded);
            k.dense_tile(s.decoded, kFloat32, n, w.k, s.rows, rows, y, kTileRows);
        }
    }
}

// Add scale · B t to the rows of this block that have adapters. No bit of the other rows changes.
void expand(const Kernels& k, const LoraDelta& delta, const Linear& w, int64_t tile, int64_t first, int64_t rows,
            const Scratch& s, float* y) {
    int64_t n0 = tile * kTileRows, n = std::min<int64_t>(kTileRows, w.n - n0);
    for (const LoraDelta::Segment& segment : delta.segments) {
        const Lora& lora = *delta.lora;
        const int32_t* begin = lora.rows + segment.first;
        const int32_t* end = lora.rows + segment.last;
        const int32_t* from = std::lower_bound(begin, end, int32_t(first));
        const int32_t* to = std::lower_bound(from, end, int32_t(first + rows));
        int64_t rank = segment.pair->rank;
        const uint8_t* b = (const uint8_t*)segment.pair->b + n0 * rank * element_bytes(segment.pair->dtype);
        if (to - from == 1) {
            float scale = lora.scales[from - lora.rows] * segment.pair->scale;
            const float* t = segment.t + (from - begin) * rank;
            k.add_row(b, segment.pair->dtype, n, rank, t, scale, y + (*from - first) * kTileRows);
            continue;
        }
        // A row may name the same slot twice, so a segment can have more entries here than the block has rows.
        for (const int32_t* some = from; some < to; some += kBlockRows) {
            int64_t count = std::min<int64_t>(to - some, kBlockRows);
            for (int64_t i = 0; i < count; i++) s.rows[i] = segment.t + (some - begin + i) * rank;
            k.dense_tile(b, segment.pair->dtype, n, rank, s.rows, count, s.delta, kTileRows);
            for (int64_t i = 0; i < count; i++) {
                float scale = lora.scales[some - lora.rows + i] * segment.pair->scale;
                float* row = y + (some[i] - first) * kTileRows;
                for (int64_t j = 0; j < n; j++) row[j] += s.delta[i * kTileRows + j] * scale;
            }
        }
    }
}

// Read a tile's rows of every B before the product, so that they arrive during it. They are many short runs, one per
// adapter, which hardware prefetchers do not find. These are loads, because prefetch instructions did not help (eight
// adapters of rank 16 on Zen 4: 120 tokens/s with prefetches, 131 with loads).
void fetch_expand(const LoraDelta& delta, const Linear& w, int64_t tile) {
    int64_t n0 = tile * kTileRows, n = std::min<int64_t>(kTileRows, w.n - n0);
    for (const LoraDelta::Segment& segment : delta.segments) {
        int64_t row_bytes = segment.pair->rank * element_bytes(segment.pair->dtype);
        const char* b = (const char*)segment.pair->b + n0 * row_bytes;
        for (int64_t i = 0; i < n * row_bytes; i += 64) (void)*(const volatile char*)(b + i);
    }
}

// Add bias and LoRA to one tile's block.
void complete(const Kernels& k, const Linear& w, const LoraDelta* delta, int64_t tile, int64_t first, int64_t rows,
              const Scratch& s, float* y) {
    int64_t n0 = tile * kTileRows, n = std::min<int64_t>(kTileRows, w.n - n0);
    if (w.bias != nullptr) {
        for (int64_t m = 0; m < rows; m++) {
            for (int64_t j = 0; j < n; j++) y[m * kTileRows + j] += w.bias[n0 + j];
        }
    }
    if (delta != nullptr) expand(k, *delta, w, tile, first, rows, s, y);
}

// Write one tile's block to the result: stored, added, or combined to SwiGLU.
void put(const Kernels& k, const Product& p, int64_t tile, int64_t first, int64_t rows, const float* y,
         const float* up) {
    int64_t n0 = tile * kTileRows, n = std::min<int64_t>(kTileRows, p.weight->n - n0);
    for (int64_t m = 0; m < rows; m++, y += kTileRows, up += kTileRows) {
        float* to = p.y + (first + m) * p.stride + n0;
        switch (p.result) {
            case Product::kStore: memcpy(to, y, size_t(n) * 4); break;
            case Product::kAdd: k.add(y, n, to); break;
            case Product::kSwiGlu: k.silu_mul(y, up, n, to); break;
        }
    }
}

// Compute `count` neighbouring tiles, from product to result; count · rows is at most kBlockRows.
void finish_tiles(const Kernels& k, const Product& p, const Activations& x, int64_t tile, int64_t count, int64_t first,
                  int64_t rows, const Scratch& s) {
    struct Side {
        const Linear* weight;
        const LoraDelta* delta;
        float* y;
    };
    const Side sides[] = {{p.weight, p.delta, s.y}, {p.up, p.up_delta, s.other}};
    for (const Side& side : sides) {
        if (side.weight == nullptr) continue;
        for (int64_t t = 0; side.delta != nullptr && t < count; t++) {
            fetch_expand(*side.delta, *side.weight, tile + t);
        }
        tile_products(k, *side.weight, x, tile, count, first, rows, s, side.y);
        for (int64_t t = 0; t < count; t++) {
            complete(k, *side.weight, side.delta, tile + t, first, rows, s, side.y + t * rows * kTileRows);
        }
    }
    for (int64_t t = 0; t < count; t++) {
        int64_t at = t * rows * kTileRows;
        put(k, p, tile + t, first, rows, s.y + at, s.other + at);
    }
}

}  // namespace

Activations activations(Context& context, const float* x, int64_t rows, int64_t k) {
    Activations a{x, rows, k, nullptr, nullptr};
    if (k % kGroup == 0) {
        a.integers = context.arena.take<int16_t>(rows * k);
        a.factors = context.arena.take<float>(rows * (k / kGroup));
    }
    return a;
}

void quantize_row(const Context& context, const Activations& a, int64_t row) {
    if (a.integers == nullptr) return;
    context.kernels->quantize_row(a.x + row * a.k, a.k / kGroup, a.rows, a.integers + row * kGroup, a.factors + row);
}

void quantize(Context& context, const Activations& a) {
    if (a.integers == nullptr) return;
    context.pool.each(a.rows, [&](int64_t row, int) { quantize_row(context, a, row); });
}

void shrink(Context& context, const Lora* lora, const int* modules, int count, const float* x, int64_t k,
            LoraDelta* deltas) {
    struct Task {
        const LoraDelta::Segment* segment;
        int64_t first_rank, first, last;
    };
    for (int i = 0; i < count; i++) {
        deltas[i].lora = lora;
        deltas[i].segments.clear();
    }
    if (lora == nullptr) return;
    std::vector<Task> tasks;
    for (int i = 0; i < count; i++) {
        const LoraPair* pairs = lora->pairs + int64_t(modules[i]) * lora->num_slots;
        for (int32_t first = 0, last; first < lora->num_entries; first = last) {
            int32_t slot = lora->slots[first];
            for (last = first; last < lora->num_entries && lora->slots[last] == slot;) last++;
            const LoraPair* pair = pairs + slot;
            if (pair->a == nullptr) continue;
            float* t = context.arena.take<float>(int64_t(last - first) * pair->rank);
            deltas[i].segments.push_back({pair, first, last, t});
        }
    }
    for (int i = 0; i < count; i++) {
        for (const LoraDelta::Segment& s : deltas[i].segments) {
            for (int64_t r = 0; r < s.pair->rank; r += kShrinkRanks) {
                for (int64_t e = s.first; e < s.last; e += kShrinkRows) {
                    tasks.push_back({&s, r, e, std::min<int64_t>(e + kShrinkRows, s.last)});
                }
            }
        }
    }
    context.pool.each(int64_t(tasks.size()), [&](int64_t i, int) {
        const Task& task = tasks[size_t(i)];
        const LoraPair& pair = *task.segment->pair;
        const float* rows[kShrinkRows];
        for (int64_t e = task.first; e < task.last; e++) rows[e - task.first] = x + lora->rows[e] * k;
        const uint8_t* a = (const uint8_t*)pair.a + task.first_rank * k * element_bytes(pair.dtype);
        float* t = task.segment->t + (task.first - task.segment->first) * pair.rank + task.first_rank;
        int64_t ranks = std::min<int64_t>(kShrinkRanks, pair.rank - task.first_rank);
        context.kernels->dense_tile(a, pair.dtype, ranks, k, rows, task.last - task.first, t, pair.rank);
    });
}

void multiply(Context& context, const Activations& x, const Product* products, int count) {
    struct Share {  // the tasks of one product
        int64_t tiles, tiles_per_task, first_task;
    };
    int64_t blocks = (x.rows + kBlockRows - 1) / kBlockRows, num_tasks = 0, decoded = 0;
    int64_t block_rows = blocks == 0 ? 0 : (x.rows + blocks - 1) / blocks;
    int64_t run = block_rows == 1 ? kTilesOfOneRow : block_rows <= kFewRows ? kTilesOfFewRows : 1;
    std::vector<Share> shares;
    for (int i = 0; i < count; i++) {
        const Linear& w = *products[i].weight;
        // A tile is read once for each block, but computed once for every few rows.
        int64_t work = bytes_of_tile(w) * std::max<int64_t>(1, block_rows / 4);
        if (products[i].up != nullptr) work *= 2;
        Share share{tiles_of(w.n), std::max<int64_t>(1, kTaskBytes / work), num_tasks};
        // A small matrix still has tasks for every thread.
        int64_t fair = (share.tiles + context.pool.num_threads() - 1) / context.pool.num_threads();
        share.tiles_per_task = (std::min(share.tiles_per_task, fair) + run - 1) / run * run;
        num_tasks += blocks * ((share.tiles + share.tiles_per_task - 1) / share.tiles_per_task);
        shares.push_back(share);
        for (const Linear* l : {products[i].weight, products[i].up}) {
            if (l != nullptr && l->kind == kNf4Flat) decoded = std::max(decoded, kTileRows * l->k);
        }
    }
    int64_t block_floats = kBlockRows * kTileRows;
    Context::PerThread floats = context.per_thread(3 * block_floats + decoded);
    const float** pointers = context.arena.take<const float*>(kBlockRows * context.pool.num_threads());
    Ranges ranges(context.arena, context.pool.num_threads(), num_tasks);
    context.pool.each(num_tasks, [&](int64_t, int thread) {
        int64_t task = ranges.draw(thread);
        int i = count - 1;
        while (task < shares[size_t(i)].first_task) i--;
        const Share& share = shares[size_t(i)];
        float* memory = floats.of(thread);
        Scratch s{memory, memory + block_floats, memory + 2 * block_floats, pointers + thread * kBlockRows,
                  memory + 3 * block_floats};
        int64_t tasks_per_block = (share.tiles + share.tiles_per_task - 1) / share.tiles_per_task;
        int64_t index = task - share.first_task;
        int64_t first = std::min(index / tasks_per_block * block_rows, x.rows);
        int64_t rows = std::min(block_rows, x.rows - first);
        if (rows == 0) return;
        int64_t tile = index % tasks_per_block * share.tiles_per_task;
        int64_t end = std::min(tile + share.tiles_per_task, share.tiles);
        for (int64_t some; tile < end; tile += some) {
            some = std::min(run, end - tile);
            finish_tiles(*context.kernels, products[i], x, tile, some, first, rows, s);
        }
    });
}

}  // namespace guanaco
