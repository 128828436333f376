// A few persistent threads that run numbered tasks together. Between calls they spin for a moment, since the next call
// usually comes within microseconds, and then sleep. The caller spins for the last tasks as long as the threads with
// these tasks run. If other programs occupy their cores, it sleeps, which frees its own core for them. It has no OpenMP
// of its own: torch has one, and two would compete for the cores. A pool may also run on torch's threads.
#pragma once
#include <stdint.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace guanaco {

class ThreadPool {
  public:
    using Task = void (*)(void* context, int64_t task, int thread);

    // OpenMP's entry for a parallel region, as GCC calls it (GOMP_parallel): body(data) on `threads` threads at once.
    using Team = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

    // team: another library's threads to use instead of own ones, or null. Where calls alternate with that library's,
    // one set of threads never waits for a core that the other one still spins on.
    explicit ThreadPool(int num_threads, Team team = nullptr);
    ~ThreadPool();
    int num_threads() const { return num_threads_; }

    // Run task(context, i, thread) for i = 0 ... num_tasks - 1 on all threads, the caller's among them (thread 0), and
    // return when all are done. Any thread may run any task: results must not depend on which does.
    void run(Task task, void* context, int64_t num_tasks);

    // The same for any callable f(task, thread).
    template <class F>
    void each(int64_t num_tasks, F&& f) {
        run([](void* c, int64_t i, int t) { (*static_cast<F*>(c))(i, t); }, &f, num_tasks);
    }

    int64_t num_sleeps() const { return num_sleeps_; }  // how often a caller has slept until the threads were done

  private:
    // epoch | number of tasks | next task, in one word: the same word that gives a thread its task says that it exists.
    static constexpr int kTaskBits = 20;
    static constexpr uint64_t kTaskMask = (uint64_t(1) << kTaskBits) - 1;
    static uint64_t next_of(uint64_t ticket) { return ticket & kTaskMask; }
    static uint64_t count_of(uint64_t ticket) { return (ticket >> kTaskBits) & kTaskMask; }

    void run_in_team(Task task, void* context, int64_t num_tasks) const;
    bool work(int thread);  // take and run tasks until none are left; returns whether there were any
    void loop(int thread);
    void end();  // stop and join the threads
    void wait_for(uint64_t num_tasks);
    int64_t threads_time() const;  // microseconds of processor time that all threads together have used

    int num_threads_;
    Team team_;
    Task task_ = nullptr;
    void* context_ = nullptr;
    alignas(64) std::atomic<uint64_t> ticket_{0};
    alignas(64) std::atomic<uint64_t> finished_{0};
    alignas(64) std::atomic<int> sleepers_{0};
    std::atomic<bool> stop_{false};
    std::mutex mutex_;
    std::condition_variable wake_, done_;
    alignas(64) std::atomic<bool> caller_sleeps_{false};
    int64_t num_sleeps_ = 0;
    std::vector<std::thread> threads_;
};

}  // namespace guanaco
