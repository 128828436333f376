#include "thread_pool.h"

#include <pthread.h>
#include <time.h>
#include <unistd.h>

#include <chrono>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace guanaco {
namespace {

// How long an idle thread spins. Longer than the gaps between the phases of a step, short for other programs.
constexpr int64_t kSpin = 150;  // microseconds
// How often a waiting caller checks whether the threads with the last tasks have a core. Longer than waking up takes.
constexpr int64_t kPatience = 100;  // microseconds
constexpr int kPausesPerLook = 64;  // at the clock

int64_t now() {  // microseconds
    using namespace std::chrono;
    return duration_cast<microseconds>(steady_clock::now().time_since_epoch()).count();
}

inline void pause_cpu() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

}  // namespace

ThreadPool::ThreadPool(int num_threads, Team team) : num_threads_(num_threads < 1 ? 1 : num_threads), team_(team) {
    try {
        for (int i = 1; team_ == nullptr && i < num_threads_; i++) threads_.emplace_back([this, i] { loop(i); });
    } catch (...) {
        end();  // the destructor does not run, and a thread that nobody joined would end the process
        throw;
    }
}

ThreadPool::~ThreadPool() { end(); }

void ThreadPool::end() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& t : threads_) t.join();
}

void ThreadPool::run_in_team(Task task, void* context, int64_t num_tasks) const {
    struct Shared {
        Task task;
        void* context;
        int64_t num_tasks;
        std::atomic<int64_t> next{0};
        std::atomic<int> threads{0};
    } shared{task, context, num_tasks};
    team_(
        [](void* data) {
            Shared& s = *static_cast<Shared*>(data);
            int thread = s.threads.fetch_add(1, std::memory_order_relaxed);
            for (int64_t i; (i = s.next.fetch_add(1, std::memory_order_relaxed)) < s.num_tasks;) s.task(s.context, i, thread);
        },
        &shared, unsigned(num_threads_), 0);
}

bool ThreadPool::work(int thread) {
    bool any = false;
    for (;;) {
        uint64_t ticket = ticket_.load(std::memory_order_acquire);
        if (next_of(ticket) >= count_of(ticket)) return any;
        // The word may belong to a newer call by now. Then this takes one of that call's tasks, which does no harm.
        ticket = ticket_.fetch_add(1, std::memory_order_acq_rel);
        if (next_of(ticket) >= count_of(ticket)) return any;
        // run() can't return, and these fields can't change, before this task is counted as finished.
        task_(context_, int64_t(next_of(ticket)), thread);
        // Sequentially consistent with wait_for(): either that sees this task finished, or its sleep is seen here.
        bool last = finished_.fetch_add(1, std::memory_order_seq_cst) + 1 == count_of(ticket);
        if (last && caller_sleeps_.load(std::memory_order_seq_cst)) {
            std::lock_guard<std::mutex> lock(mutex_);
            done_.notify_one();
        }
        any = true;
    }
}

void ThreadPool::run(Task task, void* context, int64_t num_tasks) {
    if (num_threads_ == 1 || num_tasks <= 1) {
        for (int64_t i = 0; i < num_tasks; i++) task(context, i, 0);
        return;
    }
    if (team_ != nullptr) return run_in_team(task, context, num_tasks);
    // More tasks than the word can count run in several rounds. No real batch is that large.
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
    wait_for(uint64_t(num_tasks));
}

int64_t ThreadPool::threads_time() const {
#if defined(_POSIX_THREAD_CPUTIME) && _POSIX_THREAD_CPUTIME >= 0
    int64_t sum = 0;
    for (const std::thread& t : threads_) {
        clockid_t clock;
        timespec time;
        if (pthread_getcpuclockid(const_cast<std::thread&>(t).native_handle(), &clock) != 0) continue;
        if (clock_gettime(clock, &time) == 0) sum += int64_t(time.tv_sec) * 1000000 + time.tv_nsec / 1000;
    }
    return sum;
#else
    return now();  // as if they always had a core: the caller spins
#endif
}

// Wait until the last tasks, which other threads run, are finished. An idle thread sleeps after kSpin, so from then on
// all processor time of the threads is spent on unfinished tasks.
void ThreadPool::wait_for(uint64_t num_tasks) {
    int64_t last = 0, had = -1;  // when the threads' processor time was last read, and its value; -1: not yet
    for (int i = 1; finished_.load(std::memory_order_acquire) < num_tasks; i++) {
        pause_cpu();
        if (i % kPausesPerLook != 0) continue;
        int64_t time = now();
        if (last == 0) last = time;
        if (time - last < kPatience) continue;
        int64_t have = threads_time();
        if (had >= 0 && 2 * (have - had) < time - last) {
            // Sleeping may free the core that they need.
            std::unique_lock<std::mutex> lock(mutex_);
            caller_sleeps_.store(true, std::memory_order_seq_cst);
            done_.wait(lock, [&] { return finished_.load(std::memory_order_seq_cst) >= num_tasks; });
            caller_sleeps_.store(false, std::memory_order_relaxed);
            num_sleeps_++;
            return;
        }
        last = time;
        had = have;
    }
}

void ThreadPool::loop(int thread) {
    int64_t idle_since = now();
    for (int i = 0; !stop_.load(std::memory_order_relaxed); i++) {
        if (work(thread)) {
            idle_since = now();
            continue;
        }
        pause_cpu();
        if (i % kPausesPerLook != 0 || now() - idle_since < kSpin) continue;
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, [this] {
            uint64_t ticket = ticket_.load(std::memory_order_seq_cst);
            return stop_.load(std::memory_order_relaxed) || next_of(ticket) < count_of(ticket);
        });
        sleepers_.fetch_sub(1, std::memory_order_relaxed);
        idle_since = now();
    }
}

}  // namespace guanaco
