// The state of one CpuOps: its threads, its ISA, and memory for intermediate results, which grows to the need of a
// step.
#pragma once
#include <stdlib.h>

#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "kernels.h"
#include "thread_pool.h"

namespace guanaco {

// Memory that is handed out in pieces, and freed from a mark on or all at once. Pieces never move.
class Arena {
  public:
    struct Mark {
        size_t chunk, used;
    };

    // `count` elements, aligned to a cache line, uninitialised.
    template <class T>
    T* take(int64_t count) {
        size_t bytes = (size_t(count) * sizeof(T) + 63) / 64 * 64;
        while (current_ < chunks_.size() && used_ + bytes > chunks_[current_].bytes) {
            current_++;
            used_ = 0;
        }
        if (current_ == chunks_.size()) add_chunk(bytes);
        char* p = chunks_[current_].memory.get() + used_;
        used_ += bytes;
        return reinterpret_cast<T*>(p);
    }
    Mark mark() const { return {current_, used_}; }
    // Free everything that was handed out since the mark.
    void rewind(Mark mark) {
        current_ = mark.chunk;
        used_ = mark.used;
    }
    // Free everything. Several chunks are replaced by one large chunk, which is enough for the next step of this size.
    void reset() {
        if (chunks_.size() > 1) {
            size_t total = 0;
            for (const Chunk& c : chunks_) total += c.bytes;
            chunks_.clear();
            add_chunk(total);
        }
        current_ = used_ = 0;
    }

  private:
    struct Free {
        void operator()(char* p) const { free(p); }
    };
    struct Chunk {
        std::unique_ptr<char, Free> memory;
        size_t bytes;
    };
    void add_chunk(size_t bytes) {
        if (bytes < (size_t(1) << 20)) bytes = size_t(1) << 20;
        char* p = static_cast<char*>(aligned_alloc(64, bytes));
        if (p == nullptr) throw std::bad_alloc();
        chunks_.push_back({std::unique_ptr<char, Free>(p), bytes});
    }
    std::vector<Chunk> chunks_;
    size_t current_ = 0, used_ = 0;
};

struct Context {
    Context(const Kernels* k, int num_threads, ThreadPool::Team team) : kernels(k), pool(num_threads, team) {}
    const Kernels* kernels;
    ThreadPool pool;
    Arena arena;
    std::mutex mutex;  // one call at a time

    // `count` floats for each thread. Those of thread i begin at i * count, with count rounded up to a cache line.
    struct PerThread {
        float* memory;
        int64_t stride;
        float* of(int thread) const { return memory + thread * stride; }
    };
    PerThread per_thread(int64_t count) {
        int64_t stride = (count + 15) / 16 * 16;
        return {arena.take<float>(stride * pool.num_threads()), stride};
    }
};

}  // namespace guanaco
