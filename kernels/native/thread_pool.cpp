#include "thread_pool.h"

#include <chrono>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace guanaco {
namespace {

// Longer than the gaps between the phases of a step, shorter than what a sleeping neighbour would mind.
constexpr auto kSpin = std::chrono::microseconds(150);
// A thread that waits for others gives its core away after this many pauses: there may be more threads than cores.
constexpr int kPausesBeforeYield = 2000;

inline void pause_cpu() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

}  // namespace

ThreadPool::ThreadPool(int num_threads) : num_threads_(num_threads < 1 ? 1 : num_threads) {
    for (int i = 1; i < num_threads_; i++) threads_.emplace_back([this, i] { loop(i); });
}

ThreadPool::~ThreadPool() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& t : threads_) t.join();
}

bool ThreadPool::work(int thread) {
    bool any = false;
    for (;;) {
        uint64_t ticket = ticket_.load(std::memory_order_acquire);
        if (next_of(ticket) >= count_of(ticket)) return any;
        // The word may be a newer call's by now. Then this draws one of its tasks, which is just as well.
        ticket = ticket_.fetch_add(1, std::memory_order_acq_rel);
        if (next_of(ticket) >= count_of(ticket)) return any;
        // run() cannot return, nor these fields change, before this task is counted as finished.
        task_(context_, int64_t(next_of(ticket)), thread);
        finished_.fetch_add(1, std::memory_order_release);
        any = true;
    }
}

void ThreadPool::run(Task task, void* context, int64_t num_tasks) {
    if (num_threads_ == 1 || num_tasks <= 1) {
        for (int64_t i = 0; i < num_tasks; i++) task(context, i, 0);
        return;
    }
    // More tasks than the word can count (nobody's batch is that large) run in several rounds.
    while (uint64_t(num_tasks) > kTaskMask / 2) {
        struct Shifted {
            Task task;
            void* context;
            int64_t first;
        } rest{task, context, num_tasks - int64_t(kTaskMask / 2)};
        run([](void* c, int64_t i, int t) { auto* s = static_cast<Shifted*>(c); s->task(s->context, s->first + i, t); },
            &rest, int64_t(kTaskMask / 2));
        num_tasks = rest.first;
    }
    task_ = task;
    context_ = context;
    finished_.store(0, std::memory_order_relaxed);
    uint64_t epoch = (ticket_.load(std::memory_order_relaxed) >> (2 * kTaskBits)) + 1;
    ticket_.store(epoch << (2 * kTaskBits) | uint64_t(num_tasks) << kTaskBits, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
        std::lock_guard<std::mutex> lock(mutex_);
        wake_.notify_all();
    }
    work(0);
    for (int i = 0; finished_.load(std::memory_order_acquire) < uint64_t(num_tasks); i++) {
        if (i < kPausesBeforeYield) {
            pause_cpu();
        } else {
            std::this_thread::yield();
        }
    }
}

void ThreadPool::loop(int thread) {
    auto idle_since = std::chrono::steady_clock::now();
    for (int i = 0; !stop_.load(std::memory_order_relaxed); i++) {
        if (work(thread)) {
            idle_since = std::chrono::steady_clock::now();
            continue;
        }
        pause_cpu();
        if (i % 64 != 0 || std::chrono::steady_clock::now() - idle_since < kSpin) continue;
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, [this] {
            uint64_t ticket = ticket_.load(std::memory_order_seq_cst);
            return stop_.load(std::memory_order_relaxed) || next_of(ticket) < count_of(ticket);
        });
        sleepers_.fetch_sub(1, std::memory_order_relaxed);
        idle_since = std::chrono::steady_clock::now();
    }
}

}  // namespace guanaco
