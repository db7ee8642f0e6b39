// emulated: what the machine that runs kernels on the CPU offers to the headers that stand for CUDA's builtins and for
// cuda_src/ptx. machine.cpp is the machine. Nothing of the standard library is included: kernels compile in half the
// time.
#pragma once

namespace emulated {

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;

// --- who a thread is ------------------------------------------------------------------------------------

struct Index {
  u32 x, y, z;
};

Index thread_index();
Index block_index();
Index block_extent();
Index grid_extent();
u32 lane();
u32 cluster_rank();  // of the block in its cluster
u32 cluster_extent();

// --- what threads do together ---------------------------------------------------------------------------

// What lanes of a warp do together: the vote of each, and what comes of all votes.
enum class Vote { ballot, any, all, maximum, minimum, sum, signed_maximum, signed_minimum, bit_or, bit_and, bit_xor };

void sync_warp(u32 mask);
u32 vote(Vote kind, u32 mask, u32 value);

// The value of lane `source`, which every lane names for itself.
u32 shuffle(u32 mask, u32 value, u32 source);

enum class Join { none, any, all, count };

// The barrier of all threads of a block that have not ended.
int sync_threads(Join join, int predicate);

// Named barriers, of so many threads.
void bar_sync(u32 barrier, u32 threads);
void bar_arrive(u32 barrier, u32 threads);

// The barrier of all threads of a cluster that have not ended: a thread comes, and waits later. It orders nothing but
// the making of mbarriers.
void cluster_arrive();
void cluster_wait();

// --- memory ---------------------------------------------------------------------------------------------

// The place of a __shared__ variable in a thread block's shared memory: the same for every block.
u32 reserve(u32 bytes, u32 alignment);
void* shared_object(u32 place);
char* dynamic_shared();

template <class T>
u32 reserve() {
  return reserve(sizeof(T), alignof(T));
}

template <class T>
T& shared_object_of(u32 place) {
  return *static_cast<T*>(shared_object(place));
}

// tile::offset: how far from the beginning of a struct a member lies.
template <class Struct, class Type>
inline int offset_of(Type Struct::* member) {
  return int(__builtin_bit_cast(long, member));
}

template <auto member>
struct Offset {
  operator int() const { return offset_of(member); }
};

u32 shared_address(const void* pointer);
void ld_shared(void* to, u32 address, u32 bytes);
void st_shared(u32 address, const void* from, u32 bytes);
u32 ld_relaxed_shared(u32 address);
void st_relaxed_shared(u32 address, u32 value);
u32 mapa(u32 address, u32 rank);
void ldmatrix_x4(u32 (&r)[4], u32 address, bool transposed);
void stmatrix_x4(u32 address, const u32 (&r)[4]);

// The copy engine: barriers in shared memory, and copies to it that complete there.
void mbarrier_init(u32 address, u32 arrivals);
void fence_mbarrier_init();
void mbarrier_arrive(u32 address);
void mbarrier_arrive_expect_tx(u32 address, u32 bytes);
bool mbarrier_try_wait_parity(u32 address, u32 parity);  // which does wait
bool mbarrier_test_wait_parity(u32 address, u32 parity);
void tensor_load(u32 destination, const void* map, u32 mbarrier, const i32* at, u32 rank);
void bulk_load(u32 destination, const void* source, u32 bytes, u32 mbarrier);

// A store to the shared memory of a block of the cluster that completes on an mbarrier there.
void st_async(u32 address, const void* from, u32 bytes, u32 mbarrier);

// Copies from shared memory, in groups of the thread's.
void bulk_store(void* destination, u32 source, u32 bytes, bool adds);
void bulk_commit_group();
void bulk_wait_group(u32 pending, bool only_read);
void fence_proxy_async();

// The registers of the warp's threads.
void setmaxnreg(u32 wanted, bool grows);

void cp_async(u32 destination, const void* source, u32 bytes, int valid);
void cp_async_commit_group();
void cp_async_wait_group(u32 pending);

u32 local_address(const void* pointer);
void* local_pointer(u32 address);

// Accesses to global memory that other threads wait for or take part in.
i32 ld_acquire(const i32* address);
void st_release(i32* address, i32 value);
i32 atomic_add(i32* address, i32 value, bool acquires);  // which always releases
i32 atomic_inc(i32* address, i32 last);                  // which acquires and releases
i32 atomic_cas(i32* address, i32 expected, i32 value);   // which acquires
i32 atomic_add_relaxed(i32* address, i32 value);
void reduce_add(float* address, float value);
void reduce_add(u64* address, u64 value);

// --- products -------------------------------------------------------------------------------------------

void mma_m16n8k16_f16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1);
void mma_m16n8k16_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1);
void mma_m16n8k8_tf32(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1);

struct Wgmma {
  const char* name;
  bool is_bf16, from_registers, transposed, accumulate;
  u32 columns;
  u64 a, b;  // descriptors
};

// d: the thread's registers. a: those of A, if it is there.
void wgmma(float* d, const u32* a, const Wgmma& what);
void wgmma_fence();
void wgmma_commit_group();
void wgmma_wait_group(u32 pending);

}  // namespace emulated
