// Cases of kernels/cpu/native/thread_pool.h, each a subcommand; prints what test_thread_pool.py compares. A task that sleeps
// stands for a thread whose core another program has: it makes no headway and uses no processor time.
#include <stdio.h>
#include <string.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "thread_pool.h"

using guanaco::ThreadPool;

namespace {

void sleep_ms(int ms) { std::this_thread::sleep_for(std::chrono::milliseconds(ms)); }

// `count` calls of two tasks. The one that the other thread draws sleeps; the caller's waits until it has begun.
void stall(ThreadPool& pool, int count, int ms) {
    for (int call = 0; call < count; call++) {
        std::atomic<bool> begun{false};
        pool.each(2, [&](int64_t, int thread) {
            if (thread != 0) {
                begun = true;
                sleep_ms(ms);
            } else {
                for (int i = 0; i < 2000 && !begun; i++) std::this_thread::sleep_for(std::chrono::microseconds(50));
            }
        });
    }
}

void sleeps() {
    ThreadPool pool(2);
    for (int call = 0; call < 20 && pool.num_sleeps() == 0; call++) stall(pool, 1, 5);
    printf("%d\n", pool.num_sleeps() > 0);
}

// Every task once, by whatever threads, whether callers sleep or not.
void all_tasks() {
    ThreadPool pool(3);
    int64_t wrong = 0;
    for (int call = 0; call < 3000; call++) {
        int64_t tasks = call % 37;
        std::vector<std::atomic<int>> runs(tasks);
        pool.each(tasks, [&](int64_t task, int) {
            if (call % 200 == 0 && task % 16 == 3) sleep_ms(1);
            runs[task]++;
        });
        for (auto& r : runs) wrong += r != 1;
    }
    printf("%d\n", int(wrong));
}

}  // namespace

int main(int argc, char** argv) {
    const char* name = argc > 1 ? argv[1] : "";
    if (strcmp(name, "sleeps") == 0) return sleeps(), 0;
    if (strcmp(name, "all_tasks") == 0) return all_tasks(), 0;
    return 2;
}
