// CUDA C++ on one CPU core: what a kernel needs to compile with a host compiler, and a scheduler.
//
// The threads of a block are fibers. One runs until it meets a barrier, then the next; when all of
// them wait at the same barrier they go on. Blocks run one after the other. So results repeat to
// the last bit, and a barrier that some threads miss is an error and no hang. What it does not
// show: races between threads that no barrier of this schedule brings to light.
#pragma once
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <type_traits>
#include <utility>
#ifndef __x86_64__
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __shared__ __attribute__((section("emu_shared"))) static  // see clear_shared

struct dim3 {
  unsigned x, y, z;
};
struct __align__(8) float2 { float x, y; };
struct __align__(16) float4 { float x, y, z, w; };
struct __align__(8) int2 { int x, y; };
struct __align__(16) int4 { int x, y, z, w; };
struct __align__(16) double2 { double x, y; };
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline int2 make_int2(int x, int y) { return {x, y}; }
static inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
static inline double2 make_double2(double x, double y) { return {x, y}; }

static dim3 threadIdx, blockIdx, blockDim, gridDim;
enum { warpSize = 32 };

extern "C" char __start_emu_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_emu_shared[] __attribute__((weak, visibility("hidden")));

namespace emu {

enum { STACK = 1 << 17, MOST_THREADS = 1024, MOST_COPIES = 256 };
enum State { READY, AT_BLOCK, AT_WARP, DONE };
enum Code { FINE, DIVERGED, FAULT, OVERRUN };

struct Copy {  // one cp.async on its way
  void *to;
  char bytes[16];
  int size, group;
};

struct Fiber {
  State state;
  int line;         // of the barrier it waits at
  int64_t arrived;  // for warps: how many collectives it has entered
  dim3 index;
  int group;  // of the asynchronous copies it issues
  int copies;
  Copy copy[MOST_COPIES];
#ifdef __x86_64__
  void *sp;
#else
  ucontext_t context;
#endif
};

struct Launch {
  unsigned grid[3], block[3];
  int64_t shared;
  int64_t where[4];  // out: fault address, or block and line
  char message[256];
};

static Fiber *fibers, *current;
static char *stacks, *dynamic;
static int threads;
static void (*body)(void *);
static void *body_argument;
static Launch *launch_;
static sigjmp_buf recover;

#ifdef __x86_64__
extern "C" void emu_switch(void **save, void *load) __attribute__((visibility("hidden")));
asm(R"(
.text
.hidden emu_switch
.globl emu_switch
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
static void *scheduler_sp;
static void to_scheduler() { emu_switch(&current->sp, scheduler_sp); }
#else
static ucontext_t scheduler_context;
static void to_scheduler() { swapcontext(&current->context, &scheduler_context); }
#endif

static void start_fiber() {
  body(body_argument);
  current->state = DONE;
  to_scheduler();
}

static void prepare(Fiber *f, int t) {
  f->state = READY, f->line = 0, f->arrived = 0, f->group = 0, f->copies = 0;
  f->index = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
  char *top = stacks + (size_t)(t + 1) * STACK;
#ifdef __x86_64__
  void **sp = (void **)top;
  *--sp = 0;  // a return address of its own keeps the stack aligned as at a call
  *--sp = (void *)start_fiber;
  for (int i = 0; i < 6; i++) *--sp = 0;
  f->sp = sp;
#else
  getcontext(&f->context);
  f->context.uc_stack.ss_sp = top - STACK;
  f->context.uc_stack.ss_size = STACK;
  f->context.uc_link = 0;
  makecontext(&f->context, start_fiber, 0);
#endif
}

static void resume(Fiber *f) {
  current = f;
  threadIdx = f->index;
#ifdef __x86_64__
  emu_switch(&scheduler_sp, f->sp);
#else
  swapcontext(&scheduler_context, &f->context);
#endif
}

static void wait(State state, int line) {
  current->state = state;
  current->line = line;
  to_scheduler();
}

static Code fail(Code code, const char *what, int a, int b) {
  snprintf(launch_->message, sizeof launch_->message, what, a, b);
  return code;
}

// One block. Whoever waits goes on when all of its block or warp have arrived.
static Code run_block() {
  for (int t = 0; t < threads; t++) prepare(&fibers[t], t);
  for (;;) {
    int done = 0, blocked = 0, line = -1, moved = 0;
    for (int first = 0; first < threads; first += warpSize) {
      int end = first + warpSize < threads ? first + warpSize : threads;
      for (int again = 1; again;) {
        again = 0;
        for (int t = first; t < end; t++)
          if (fibers[t].state == READY) resume(&fibers[t]), moved = 1;
        int waiting = 0;
        for (int t = first; t < end; t++) waiting += fibers[t].state == AT_WARP;
        if (waiting == end - first) {
          for (int t = first; t < end; t++) {
            if (fibers[t].line != fibers[first].line)
              return fail(DIVERGED, "threads of a warp wait at lines %d and %d",
                          fibers[first].line, fibers[t].line);
            fibers[t].state = READY;
          }
          again = 1;
        } else if (waiting) {
          int l = 0;
          for (int t = first; t < end; t++)
            if (fibers[t].state == AT_WARP) l = fibers[t].line;
          return fail(DIVERGED, "line %d: %d threads of a warp do not take part", l,
                      end - first - waiting);
        }
      }
    }
    for (int t = 0; t < threads; t++) {
      done += fibers[t].state == DONE;
      if (fibers[t].state == AT_BLOCK) {
        if (blocked++ && fibers[t].line != line)
          return fail(DIVERGED, "threads of a block wait at lines %d and %d", line, fibers[t].line);
        line = fibers[t].line;
      }
    }
    if (done == threads) return FINE;
    if (blocked != threads)
      return fail(DIVERGED, "line %d: %d threads of the block never arrive", line, threads - blocked);
    for (int t = 0; t < threads; t++) fibers[t].state = READY;
    if (!moved) return fail(DIVERGED, "no thread can go on (%d done of %d)", done, threads);
  }
}

// Shared memory starts as NaN in every block, so that what nobody wrote is seen.
static void clear_shared() {
  if (__start_emu_shared) memset(__start_emu_shared, 0xff, __stop_emu_shared - __start_emu_shared);
  memset(dynamic, 0xff, launch_->shared);
}

static void on_fault(int, siginfo_t *info, void *) {
  launch_->where[0] = (int64_t)info->si_addr;
  siglongjmp(recover, FAULT);
}

static char *pages(size_t bytes) {
  void *p = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return p == MAP_FAILED ? 0 : (char *)p;
}

static Code run(Launch *launch, void (*f)(void *), void *argument) {
  static char *alternative = 0;
  enum { PAGE = 4096, ALTERNATIVE = 1 << 16 };
  if (!fibers) {
    fibers = (Fiber *)pages(sizeof(Fiber) * MOST_THREADS);
    stacks = pages((size_t)STACK * MOST_THREADS);
    alternative = pages(ALTERNATIVE);
  }
  launch_ = launch, body = f, body_argument = argument;
  gridDim = {launch->grid[0], launch->grid[1], launch->grid[2]};
  blockDim = {launch->block[0], launch->block[1], launch->block[2]};
  threads = blockDim.x * blockDim.y * blockDim.z;
  // Dynamic shared memory ends at a page that nobody may touch.
  size_t room = (launch->shared + PAGE - 1) / PAGE * PAGE;
  char *mapped = pages(room + PAGE);
  mprotect(mapped + room, PAGE, PROT_NONE);
  dynamic = mapped + (room - launch->shared) / 16 * 16;

  stack_t stack = {}, old_stack;
  stack.ss_sp = alternative, stack.ss_size = ALTERNATIVE;
  sigaltstack(&stack, &old_stack);
  struct sigaction action = {}, old_segv, old_bus;
  action.sa_sigaction = on_fault, action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigaction(SIGSEGV, &action, &old_segv), sigaction(SIGBUS, &action, &old_bus);
  volatile Code code = FINE;
  if (const int why = sigsetjmp(recover, 1)) {
    code = (Code)why;
    launch->where[1] = (int64_t)mapped, launch->where[2] = (int64_t)(mapped + room + PAGE);
    snprintf(launch->message, sizeof launch->message, "block (%u, %u, %u) thread (%u, %u, %u)",
             blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
  } else {
    for (unsigned z = 0; z < gridDim.z && code == FINE; z++)
      for (unsigned y = 0; y < gridDim.y && code == FINE; y++)
        for (unsigned x = 0; x < gridDim.x && code == FINE; x++) {
          blockIdx = {x, y, z};
          clear_shared();
          code = run_block();
        }
  }
  sigaction(SIGSEGV, &old_segv, 0), sigaction(SIGBUS, &old_bus, 0);
  sigaltstack(&old_stack, 0);
  munmap(mapped, room + PAGE);
  return code;
}

template <class T> struct Kind {  // what a launch has to pass: f or i and the size
  static void put(char *&s) { s += sprintf(s, "%c%zu ", std::is_floating_point<T>() ? 'f' : 'i', sizeof(T)); }
};
template <class T> struct Kind<T *> {  // w or r and the size of what is pointed at
  static void put(char *&s) {
    s += sprintf(s, "%c%zu ", std::is_const<T>() ? 'r' : 'w', sizeof(T));
  }
};
template <class... A> static const char *signature(void (*)(A...)) {
  static char text[1024];
  char *s = text;
  *s = 0;
  (Kind<A>::put(s), ...);
  return text;
}
template <class... A, size_t... I>
static void call(void (*f)(A...), void **args, std::index_sequence<I...>) {
  f(*(std::remove_const_t<A> *)args[I]...);
}
template <class... A> static void call(void (*f)(A...), void **args) {
  call(f, args, std::index_sequence_for<A...>());
}

// ------------------------------------------------------------------ what threads do together

static double exchange[MOST_THREADS];
static int lane() {
  return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % warpSize;
}
static int thread() { return current - fibers; }

template <class T> static T shuffle(T value, int from, int line) {
  memcpy(&exchange[thread()], &value, sizeof(T));
  wait(AT_WARP, line);
  T got = value;
  int base = thread() - lane();
  if (from >= 0 && from < warpSize && base + from < threads)
    memcpy(&got, &exchange[base + from], sizeof(T));
  wait(AT_WARP, line);
  return got;
}

template <class T> static T atomic_add(T *p, T v) {
  T old = *p;
  *p = old + v;
  return old;
}

}  // namespace emu

#define __syncthreads() emu::wait(emu::AT_BLOCK, __LINE__)
#define __syncwarp(...) emu::wait(emu::AT_WARP, __LINE__)
#define __shfl_sync(mask, v, from) emu::shuffle(v, (from) % 32, __LINE__)
#define __shfl_xor_sync(mask, v, bits) emu::shuffle(v, emu::lane() ^ (bits), __LINE__)
#define __shfl_down_sync(mask, v, by) emu::shuffle(v, emu::lane() + (by), __LINE__)
#define __shfl_up_sync(mask, v, by) emu::shuffle(v, emu::lane() - (by), __LINE__)
#define __threadfence() ((void)0)

template <class T> static inline T __ldg(const T *p) { return *p; }
static inline int atomicAdd(int *p, int v) { return emu::atomic_add(p, v); }
static inline unsigned atomicAdd(unsigned *p, unsigned v) { return emu::atomic_add(p, v); }
static inline int __umulhi(unsigned a, unsigned b) { return (uint64_t)a * b >> 32; }
template <class T> static inline T max(T a, T b) { return a > b ? a : b; }
template <class T> static inline T min(T a, T b) { return a < b ? a : b; }
static inline float max(float a, float b) { return fmaxf(a, b); }
static inline float min(float a, float b) { return fminf(a, b); }
static inline double max(double a, double b) { return fmax(a, b); }
static inline double min(double a, double b) { return fmin(a, b); }

// ------------------------------------------------------------------ device.cuh, by hand

// An asynchronous copy lands when its group is waited for, and not before.
static inline void copy_async(void *to, const void *from, int size, bool valid) {
  if (emu::current->copies == emu::MOST_COPIES) siglongjmp(emu::recover, emu::OVERRUN);
  emu::Copy &c = emu::current->copy[emu::current->copies++];
  c.to = to, c.size = size, c.group = emu::current->group;
  if (valid) memcpy(c.bytes, from, size);
  else memset(c.bytes, 0, size);
}
static inline void copy_commit() { emu::current->group++; }
template <int PENDING> static inline void copy_wait() {
  int kept = 0;
  for (int i = 0; i < emu::current->copies; i++) {
    emu::Copy &c = emu::current->copy[i];
    if (c.group < emu::current->group - PENDING) memcpy(c.to, c.bytes, c.size);
    else emu::current->copy[kept++] = c;
  }
  emu::current->copies = kept;
}

static inline uint32_t to_tf32(float x) {  // 10 bits of mantissa, to nearest, ties away from zero
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits >> 23 & 0xff) != 0xff) bits += 0x1000;
  return bits & 0xffffe000;
}

// d += a b of a whole warp; the layout of m16n8k8 in the PTX manual.
static inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static float A[32][16][8], B[32][8][8];
  int lane = emu::lane(), w = emu::thread() / 32, g = lane / 4, t = lane % 4;
  memcpy(&A[w][g][t], &a[0], 4), memcpy(&A[w][g + 8][t], &a[1], 4);
  memcpy(&A[w][g][t + 4], &a[2], 4), memcpy(&A[w][g + 8][t + 4], &a[3], 4);
  memcpy(&B[w][t][g], &b[0], 4), memcpy(&B[w][t + 4][g], &b[1], 4);
  emu::wait(emu::AT_WARP, __LINE__);
  for (int i = 0; i < 4; i++) {
    int row = g + i / 2 * 8, column = 2 * t + i % 2;
    for (int k = 0; k < 8; k++) d[i] += A[w][row][k] * B[w][k][column];
  }
  emu::wait(emu::AT_WARP, __LINE__);
}
