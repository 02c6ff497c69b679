// CUDA threads as fibers of one thread of the operating system: what cuda_runtime.h beside it stands on.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

struct dim3 {
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}  // implicit, like CUDA's
  unsigned x, y, z;
};

namespace emulation {

inline std::function<void()> after_block = [] {};
inline dim3 block_index, block_size, grid_size;
struct alignas(16) SharedBytes {
  unsigned char bytes[16];
};
inline std::vector<SharedBytes> shared;
constexpr size_t kGuard = 64;  // of them, behind what a block asks for: nobody may write there
inline unsigned char* dynamic_shared() { return shared.data()->bytes; }

class Scheduler {
 public:
  // Runs `body` on `threads` fibers until all have returned. A warp runs for as long as it can before another
  // has its turn: what it reads too early is then most likely not there yet.
  void run(unsigned threads, const std::function<void()>& body) {
    body_ = &body;
    while (fibers_.size() < threads) fibers_.push_back(std::make_unique<Fiber>());
    ready_.assign((threads + 31) / 32, {});
    count_ready_ = finished_ = 0;
    for (unsigned t = 0; t < threads; ++t) {
      prepare(*fibers_[t]);
      resume(t);
    }
    for (size_t warp = 0; count_ready_ > 0;) {
      while (ready_[warp].empty()) warp = random_() % ready_.size();
      auto& lanes = ready_[warp];
      std::swap(lanes[random_() % lanes.size()], lanes.back());
      current_ = lanes.back();
      lanes.pop_back();
      --count_ready_;
      swapcontext(&home_, &fibers_[current_]->context);
    }
    if (finished_ != threads) {
      std::printf("FAILED: %u of %u threads wait at a barrier that the others never reach\n",
                  threads - finished_, threads);
      std::exit(EXIT_FAILURE);
    }
  }

  unsigned current() const { return current_; }

  void suspend() {
    const unsigned self = current_;
    swapcontext(&fibers_[self]->context, &home_);
  }

  void resume(unsigned thread) {
    ready_[thread / 32].push_back(thread);
    ++count_ready_;
  }

 private:
  static constexpr size_t kStack = 128 * 1024;
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStack]};
  };

  static void start();

  void prepare(Fiber& fiber) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &home_;
    makecontext(&fiber.context, &Scheduler::start, 0);
  }

  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<std::vector<unsigned>> ready_;  // by warp
  ucontext_t home_;
  const std::function<void()>* body_ = nullptr;
  unsigned count_ready_ = 0, current_ = 0, finished_ = 0;
  std::minstd_rand random_{1};
};

inline Scheduler scheduler;

inline void Scheduler::start() {
  (*scheduler.body_)();
  ++scheduler.finished_;
}

// Where `size` threads wait for each other; the last to arrive first does what there is to do for all.
class Gate {
 public:
  explicit Gate(unsigned size) : size_(size) {}

  template <class Action>
  void pass(Action action) {
    if (waiting_.size() + 1 < size_) {
      waiting_.push_back(scheduler.current());
      scheduler.suspend();
      return;
    }
    action();
    for (unsigned thread : waiting_) scheduler.resume(thread);
    waiting_.clear();
  }

 private:
  unsigned size_;
  std::vector<unsigned> waiting_;
};

struct Warp {
  Gate gate{32};
  std::array<void*, 32> values, results;
};

inline std::vector<Warp> warps;
inline std::unique_ptr<Gate> block_gate;
inline int block_count, block_result;

inline dim3 thread_index() {
  const unsigned t = scheduler.current();
  return {t % block_size.x, t / block_size.x % block_size.y, t / block_size.x / block_size.y};
}

inline void sync_block() {
  block_gate->pass([] {});
}

inline int count_block(bool predicate) {
  block_count += predicate;
  block_gate->pass([] {
    block_result = block_count;
    block_count = 0;
  });
  return block_result;  // stays until all threads are here again
}

// Every lane contributes a value; `combine(values)` returns a function lane -> result. All 32 lanes take
// part.
template <class Value, class Combine>
auto warp_collective(const Value& value, Combine combine) {
  using Values = std::array<const Value*, 32>;
  using Result = decltype(combine(std::declval<const Values&>())(0));
  Result result;
  Value own = value;
  const unsigned lane = scheduler.current() % 32;
  Warp& warp = warps[scheduler.current() / 32];
  warp.values[lane] = &own;
  warp.results[lane] = &result;
  warp.gate.pass([&] {
    Values values;
    for (int l = 0; l < 32; ++l) values[l] = static_cast<const Value*>(warp.values[l]);
    const auto result_of = combine(values);
    for (int l = 0; l < 32; ++l) *static_cast<Result*>(warp.results[l]) = result_of(l);
  });
  return result;
}

inline void run(dim3 grid, dim3 threads, const std::function<void()>& body, size_t shared_bytes = 0) {
  grid_size = grid;
  block_size = threads;
  const unsigned count = threads.x * threads.y * threads.z;
  for (unsigned index = 0; index < grid.x * grid.y * grid.z; ++index) {
    block_index = {index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y};
    SharedBytes garbage;
    std::memset(garbage.bytes, 0xff, sizeof(garbage.bytes));
    shared.assign(shared_bytes / sizeof(garbage) + kGuard, garbage);
    warps.assign(count / 32, Warp{});
    block_gate = std::make_unique<Gate>(count);
    scheduler.run(count, body);
    if (std::any_of(dynamic_shared() + shared_bytes, shared.back().bytes + sizeof(garbage),
                    [](unsigned char byte) { return byte != 0xff; })) {
      std::printf("FAILED: block %u writes behind its shared memory\n", index);
      std::exit(EXIT_FAILURE);
    }
    after_block();
  }
}

}  // namespace emulation
