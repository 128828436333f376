#include "sequence_ops.h"

#include <string.h>

#include <algorithm>

namespace guanaco {
namespace {

// Query rows (queries times the heads that share a key-value head) for which a block of positions is read once.
constexpr int64_t kQueryRows = 64;

// Bytes of one position's keys that a decode reads at once. Heads are neighbours in the cache, and short reads far
// apart took twice as long.
constexpr int64_t kContiguousBytes = 512;

// Some queries of one sequence and one or more key-value heads, over one run of positions (decode) or all of them
// (prompts).
struct Task {
    int64_t sequence, kv_head, num_heads, first_query, queries;
    int64_t first_run, runs;
    int64_t partial;  // index of its first partial result; those of a decode's runs are neighbours
    bool is_last;  // whether it stores the result; false for one run of a decode, whose runs merge() joins
};

class Attention {
  public:
    Attention(Context& context, const Heads& heads, const Batch& batch, const Cache& cache, float scale,
              const float* q, float* out)
        : context_(context), kernels_(*context.kernels), heads_(heads), batch_(batch), cache_(cache), scale_(scale),
          q_(q), out_(out), share_(heads.heads / heads.kv_heads), padded_((heads.head_dim + 7) / 8 * 8) {}

    void run() {
        plan();
        // Only runs that other threads finish need their results kept: those of a decode over several runs.
        int64_t heads = heads_together();
        states_ = context_.arena.take<SoftmaxState>(num_partials_ * heads * share_);
        partials_ = context_.arena.take<float>(num_partials_ * heads * share_ * padded_);
        scratch_ = context_.per_thread(3 * max_rows() * padded_ + 2 * heads * kPositions * padded_ + 4 * max_rows());
        context_.pool.each(int64_t(tasks_.size()), [&](int64_t i, int thread) { attend(tasks_[size_t(i)], thread); });
        context_.pool.each(int64_t(merges_.size()), [&](int64_t i, int) { merge(merges_[size_t(i)]); });
    }

  private:
    int64_t heads_together() const {
        int64_t bytes = heads_.head_dim * (batch_.cache_dtype == kFloat32 ? 4 : 2);
        return std::min(heads_.kv_heads, (kContiguousBytes + bytes - 1) / bytes);
    }

    // Rows of q, of states and of results that one task needs at most.
    int64_t max_rows() const { return std::max(kQueryRows, heads_together() * share_); }

    void plan() {
        for (int64_t s = 0; s < batch_.num_sequences; s++) {
            int64_t queries = batch_.cu_seqlens_q[s + 1] - batch_.cu_seqlens_q[s];
            int64_t runs = (batch_.context_lens[s] + kSplit - 1) / kSplit;
            int64_t step = queries == 1 ? 1 : std::max<int64_t>(1, kQueryRows / share_);
            int64_t together = queries == 1 ? heads_together() : 1;
            for (int64_t h = 0; h < heads_.kv_heads; h += together) {
                int64_t n = std::min(together, heads_.kv_heads - h);
                if (queries == 1 && runs > 1) {
                    merges_.push_back({s, h, n, 0, 1, 0, runs, num_partials_, true});
                    for (int64_t r = 0; r < runs; r++) tasks_.push_back({s, h, n, 0, 1, r, 1, num_partials_++, false});
                    continue;
                }
                // The last queries of a prompt see the most positions. They go first, so that no long task comes last.
                for (int64_t i = (queries - 1) / step * step; i >= 0 && queries > 0; i -= step) {
                    tasks_.push_back({s, h, n, i, std::min(step, queries - i), 0, runs, 0, true});
                }
            }
        }
    }

    void attend(const Task& task, int thread) {
        int64_t rows = rows_of(task), block = max_rows() * padded_;
        float* q = scratch_.of(thread);
        float *total = q + block, *part = total + block, *positions = part + block;
        SoftmaxState* states = (SoftmaxState*)(positions + 2 * heads_together() * kPositions * padded_);
        SoftmaxState* part_states = states + rows;
        load_queries(task, q);
        if (!task.is_last) {
            int64_t first = task.partial * heads_together() * share_;
            kernels_.attend_run(run_of(task, task.first_run), q, states_ + first, partials_ + first * padded_, positions);
            return;
        }
        kernels_.attend_run(run_of(task, 0), q, states, total, positions);
        for (int64_t r = 1; r < task.runs; r++) {
            kernels_.attend_run(run_of(task, r), q, part_states, part, positions);
            kernels_.merge_runs(rows, padded_, part_states, part, states, total);
        }
        store(task, states, total);
    }

    void merge(const Task& task) {
        int64_t stride = heads_together() * share_;
        SoftmaxState* states = states_ + task.partial * stride;
        float* total = partials_ + task.partial * stride * padded_;
        for (int64_t r = 1; r < task.runs; r++) {
            kernels_.merge_runs(rows_of(task), padded_, states + r * stride, total + r * stride * padded_, states, total);
        }
        store(task, states, total);
    }

    AttentionRun run_of(const Task& task, int64_t run) const {
        int64_t new_tokens = batch_.cu_seqlens_q[task.sequence + 1] - batch_.cu_seqlens_q[task.sequence];
        int64_t first_limit = batch_.context_lens[task.sequence] - new_tokens + task.first_query + 1;
        return {cache_.k,
                cache_.v,
                batch_.block_tables + task.sequence * batch_.table_stride,
                batch_.block_size,
                heads_.kv_heads,
                task.kv_head,
                task.num_heads,
                heads_.head_dim,
                padded_,
                task.queries,
                share_,
                first_limit,
                run * kSplit,
                (run + 1) * kSplit,
                batch_.cache_dtype};
    }

    int64_t rows_of(const Task& task) const { return task.num_heads * task.queries * share_; }

    int64_t row_of(const Task& task, int64_t r) const {  // where row r of a task lies in q and out, in heads
        int64_t token = batch_.cu_seqlens_q[task.sequence] + task.first_query + r / share_ % task.queries;
        return token * heads_.heads + (task.kv_head + r / (share_ * task.queries)) * share_ + r % share_;
    }

    void load_queries(const Task& task, float* q) const {
        for (int64_t r = 0; r < rows_of(task); r++) {
            const float* from = q_ + row_of(task, r) * heads_.head_dim;
            for (int64_t i = 0; i < padded_; i++) q[r * padded_ + i] = i < heads_.head_dim ? from[i] * scale_ : 0.0f;
        }
    }

    void store(const Task& task, const SoftmaxState* states, const float* total) {
        for (int64_t r = 0; r < rows_of(task); r++) {
            float* to = out_ + row_of(task, r) * heads_.head_dim;
            float inverse = 1.0f / states[r].sum;
            for (int64_t i = 0; i < heads_.head_dim; i++) to[i] = total[r * padded_ + i] * inverse;
        }
    }

    Context& context_;
    const Kernels& kernels_;
    const Heads& heads_;
    const Batch& batch_;
    const Cache& cache_;
    float scale_;
    const float* q_;
    float* out_;
    int64_t share_, padded_, num_partials_ = 0;
    std::vector<Task> tasks_, merges_;
    SoftmaxState* states_ = nullptr;
    float* partials_ = nullptr;
    Context::PerThread scratch_{};
};

}  // namespace

void attention(Context& context, const Heads& heads, const Batch& batch, const Cache& cache, float scale,
               const float* q, float* out) {
    Attention(context, heads, batch, cache, scale, q, out).run();
}

void rope_and_cache(Context& context, const Heads& heads, const Batch& batch, const Cache& cache, float* q,
                    const float* k, const float* v) {
    const Kernels& kernels = *context.kernels;
    int64_t dim = heads.head_dim, half = dim / 2, kv_size = heads.kv_heads * dim;
    int64_t bytes = batch.cache_dtype == kFloat32 ? 4 : 2;
    Context::PerThread scratch = context.per_thread(dim);
    context.pool.each(batch.num_tokens, [&](int64_t t, int thread) {
        const float *cos = batch.cos + t * half, *sin = batch.sin + t * half;
        for (int64_t h = 0; h < heads.heads; h++) {
            float* head = q + (t * heads.heads + h) * dim;
            kernels.rotate(head, cos, sin, half, head);
        }
        int64_t slot = batch.slot_mapping[t];
        if (slot < 0) return;
        char* k_out = (char*)cache.k + slot * kv_size * bytes;
        float* rotated = scratch.of(thread);
        for (int64_t h = 0; h < heads.kv_heads; h++) {
            kernels.rotate(k + t * kv_size + h * dim, cos, sin, half, rotated);
            kernels.from_float(rotated, dim, k_out + h * dim * bytes, batch.cache_dtype);
        }
        kernels.from_float(v + t * kv_size, kv_size, (char*)cache.v + slot * kv_size * bytes, batch.cache_dtype);
    });
}

}  // namespace guanaco
