// Products of one warp on tensor cores, asynchronous copies, and the few other instructions that
// C++ does not say: all inline PTX of the package but the conversions of numeric.h, the stores of
// device.h and the maximum of tokens.h. Everything has a host twin, built on the maps below, for
// the emulator.
//
// Maps: PTX ISA, "Matrix Fragments for mma.m16n8k16 / m16n8k32 / m16n8k64". Element e of a fragment
// is the e-th from the low end of the lane's registers.
#pragma once
#include "device.h"

namespace fewbit::cuda {

struct Cell {
  int row, column;
};

// 16-bit elements, A 16 x 16 (8 per lane), B 16 x 8 (4 per lane).
FEWBIT_ALWAYS_INLINE Cell a16(int lane, int e) {
  return {lane / 4 + 8 * (e / 2 % 2), lane % 4 * 2 + e % 2 + 8 * (e / 4)};
}
FEWBIT_ALWAYS_INLINE Cell b16(int lane, int e) {
  return {lane % 4 * 2 + e % 2 + 8 * (e / 2), lane / 4};
}
// 8-bit elements, A 16 x 32 (16 per lane), B 32 x 8 (8 per lane).
FEWBIT_ALWAYS_INLINE Cell a8(int lane, int e) {
  return {lane / 4 + 8 * (e / 4 % 2), lane % 4 * 4 + e % 4 + 16 * (e / 8)};
}
FEWBIT_ALWAYS_INLINE Cell b8(int lane, int e) {
  return {lane % 4 * 4 + e % 4 + 16 * (e / 4), lane / 4};
}
// 4-bit elements, A 16 x 64 (32 per lane), B 64 x 8 (16 per lane).
FEWBIT_ALWAYS_INLINE Cell a4(int lane, int e) {
  return {lane / 4 + 8 * (e / 8 % 2), lane % 4 * 8 + e % 8 + 32 * (e / 16)};
}
FEWBIT_ALWAYS_INLINE Cell b4(int lane, int e) {
  return {lane % 4 * 8 + e % 8 + 32 * (e / 8), lane / 4};
}
// 32-bit sums, C and D 16 x 8 (4 per lane).
FEWBIT_ALWAYS_INLINE Cell c32(int lane, int e) {
  return {lane / 4 + 8 * (e / 2), lane % 4 * 2 + e % 2};
}

// What x is made of where it holds 4-bit codes, eight to a word.
struct Int4 {};
template <class X>
constexpr int bits_in = std::is_same_v<X, Int4> ? 4 : 8 * int(sizeof(X));

// Kernels are written for two levels: 75 (no cp.async, half-size mma, no bfloat16) and 80. Only
// the one that a card runs is compiled for it, and products of 4-bit numbers only where there are
// units for them (sm_90 has none: the instruction would become some 200 others).
#if defined(__CUDA_ARCH__)
template <class X, int level>
constexpr bool compiled =
    (level >= 80) == (__CUDA_ARCH__ >= 800) && !(std::is_same_v<X, Int4> && __CUDA_ARCH__ >= 900);
#else
template <class X, int level>
constexpr bool compiled = true;
#endif

#if !defined(__CUDACC__)
namespace emulator {
struct Fragments {
  uint32_t a[4], b[2];
};
// D = A B + C from everybody's fragments; elements lie in registers as `value` reads them.
template <class Acc, int per_register, class A, class B, class Value, class Wide>
void product(Acc (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const A& a_map,
             const B& b_map, const Value& value, Wide) {
  constexpr int depth = 8 * per_register;
  const Fragments mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const Fragments* all = gather(mine);
  const int lane = int(thread_index.x % 32);
  Wide left[2][depth], right[2][depth];
  for (int l = 0; l < 32; ++l) {
    for (int e = 0; e < 4 * per_register; ++e) {
      const Cell at = a_map(l, e);
      if (at.row % 8 == lane / 4)
        left[at.row / 8][at.column] = Wide(value(all[l].a[e / per_register], e % per_register, 0));
    }
    for (int e = 0; e < 2 * per_register; ++e) {
      const Cell at = b_map(l, e);
      if (at.column / 2 == lane % 4)
        right[at.column % 2][at.row] = Wide(value(all[l].b[e / per_register], e % per_register, 1));
    }
  }
  for (int e = 0; e < 4; ++e) {
    Wide sum = Wide(c[e]);
    for (int k = 0; k < depth; ++k) sum += left[e / 2][k] * right[e % 2][k];
    c[e] = Acc(sum);
  }
}
}  // namespace emulator
#endif

// c += A B for half (or, from level 80, bfloat16) A and B, sums in float.
template <int level, class T>
FEWBIT_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDACC__)
  if constexpr (level < 80) {  // the two halves of k are two instructions
#pragma unroll
    for (int i = 0; i < 2; ++i)
      asm volatile(
          "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6},"
          " {%0,%1,%2,%3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[2 * i]), "r"(a[2 * i + 1]), "r"(b[i]));
  } else if constexpr (std::is_same_v<T, Half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9},"
        " {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7},"
        " {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#else
  emulator::product<float, 2>(
      c, a, b, a16, b16, [](uint32_t r, int i, int) { return to_float(T{uint16_t(r >> 16 * i)}); },
      0.0);
#endif
}

// c += A B for signed A and unsigned B of 8 bits or 4 bits, sums in int32.
template <int level, class X>
FEWBIT_DEVICE void multiply(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  constexpr bool fours = std::is_same_v<X, Int4>;
#if defined(__CUDACC__)
  if constexpr (level < 80) {  // rows and k in halves
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (fours)
        asm volatile("mma.sync.aligned.m8n8k32.row.col.s32.s4.u4.s32 {%0,%1}, {%2}, {%3}, {%0,%1};"
                     : "+r"(c[2 * (i % 2)]), "+r"(c[2 * (i % 2) + 1])
                     : "r"(a[i]), "r"(b[i / 2]));
      else
        asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.u8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};"
                     : "+r"(c[2 * (i % 2)]), "+r"(c[2 * (i % 2) + 1])
                     : "r"(a[i]), "r"(b[i / 2]));
    }
  } else if constexpr (fours) {
    asm volatile(
        "mma.sync.aligned.m16n8k64.row.col.s32.s4.u4.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9},"
        " {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9},"
        " {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#else
  if constexpr (fours)
    emulator::product<int32_t, 8>(
        c, a, b, a4, b4,
        [](uint32_t r, int i, int unsigned_operand) {
          const int code = int(r >> 4 * i & 0xFu);
          return unsigned_operand || code < 8 ? code : code - 16;
        },
        int32_t(0));
  else
    emulator::product<int32_t, 4>(
        c, a, b, a8, b8,
        [](uint32_t r, int i, int unsigned_operand) {
          const uint8_t byte = uint8_t(r >> 8 * i);
          return unsigned_operand ? int(byte) : int(int8_t(byte));
        },
        int32_t(0));
#endif
}

// sum + the codes in two words of x.
template <class X>
FEWBIT_DEVICE int32_t add_codes(const uint32_t (&x)[2], int32_t sum) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if constexpr (std::is_same_v<X, Int4>) {  // c + 8 is 0..15; the eights are taken off again
      const uint32_t up = x[i] ^ 0x88888888u;
      sum = __dp4a(int(up & 0x0F0F0F0Fu), 0x01010101, sum - 64);
      sum = __dp4a(int(up >> 4 & 0x0F0F0F0Fu), 0x01010101, sum);
    } else {
      sum = __dp4a(int(x[i]), 0x01010101, sum);
    }
  }
  return sum;
}

// (a & mask) | bits, as one instruction: left alone, the compiler shares the `and` among several
// uses and then needs two.
FEWBIT_DEVICE uint32_t and_or(uint32_t a, uint32_t mask, uint32_t bits) {
#if defined(__CUDACC__)
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(r) : "r"(a), "r"(mask), "r"(bits));
  return r;
#else
  return (a & mask) | bits;
#endif
}

// Both halves apart: a b + c, rounded once.
FEWBIT_DEVICE uint32_t multiply_add_half2(uint32_t a, uint32_t b, uint32_t c) {
#if defined(__CUDACC__)
  uint32_t r;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
#else
  Half part[2];  // exact where it is used (product.h)
  for (int i = 0; i < 2; ++i) {
    const auto of = [&](uint32_t v) { return double(to_float(Half{uint16_t(v >> 16 * i)})); };
    from_float(float(of(a) * of(b) + of(c)), &part[i]);
  }
  return part[0].bits | uint32_t(part[1].bits) << 16;
#endif
}

// Both halves apart: a - b.
FEWBIT_DEVICE uint32_t subtract_half2(uint32_t a, uint32_t b) {
#if defined(__CUDACC__)
  uint32_t r;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
#else
  Half low, high;
  from_float(to_float(Half{uint16_t(a)}) - to_float(Half{uint16_t(b)}), &low);
  from_float(to_float(Half{uint16_t(a >> 16)}) - to_float(Half{uint16_t(b >> 16)}), &high);
  return low.bits | uint32_t(high.bits) << 16;
#endif
}

// Two halves to two bfloat16, rounded; level 80.
FEWBIT_DEVICE uint32_t half2_to_bfloat2(uint32_t a) {
  const float low = to_float(Half{uint16_t(a)}), high = to_float(Half{uint16_t(a >> 16)});
#if defined(__CUDACC__)
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
#else
  BFloat16 l, h;
  from_float(low, &l);
  from_float(high, &h);
  return l.bits | uint32_t(h.bits) << 16;
#endif
}

// 16 bytes to shared memory, zeros where `inside` is false. At level 80 they arrive when wait_for
// says so; at level 75 at once.
template <int level>
FEWBIT_DEVICE void copy_16(void* shared, const void* global, bool inside) {
#if defined(__CUDACC__)
  if constexpr (level >= 80) {
    const uint32_t to = uint32_t(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global),
                 "r"(inside ? 16 : 0)
                 : "memory");
    return;
  }
#else
  if constexpr (level >= 80) {
    emulator::copy_later(shared, inside ? global : nullptr);
    return;
  }
#endif
  const uint4 zero{0, 0, 0, 0};
  *static_cast<uint4*>(shared) = inside ? *static_cast<const uint4*>(global) : zero;
}

// Ends a group of copies.
template <int level>
FEWBIT_DEVICE void end_copies() {
  if constexpr (level >= 80) {
#if defined(__CUDACC__)
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    emulator::end_copies();
#endif
  }
}

// Waits until at most `open` of the caller's latest groups are under way.
template <int level, int open>
FEWBIT_DEVICE void wait_for_copies() {
  if constexpr (level >= 80) {
#if defined(__CUDACC__)
    asm volatile("cp.async.wait_group %0;" ::"n"(open) : "memory");
#else
    emulator::wait_for_copies(open);
#endif
  }
}

}  // namespace fewbit::cuda
