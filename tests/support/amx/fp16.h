/* AVX512-FP16: the conversions that oneDNN uses. */
#pragma once
#include <immintrin.h>
#include <sys/mman.h>

#include "state.h"

/* Writes the first `lanes` lanes of a vector register under a mask, and zeros after them. */
static void write_lanes(ucontext_t *context, int number, const uint8_t *in, int lanes, int bytes, int mask, int zero) {
    uint8_t value[64] = {0}, old[64];
    read_vector(context, number, old);
    for (int i = 0; i < lanes; i++) {
        int chosen = read_mask(context, mask) >> i & 1;
        if (chosen || !zero) memcpy(value + bytes * i, (chosen ? in : old) + bytes * i, bytes);
    }
    write_vector(context, number, value);
}

/* Emulates VMOVW, VCVTPS2PHX and VCVTPH2PSX of a repeated operand; rewrites other VCVTPH2PSX in place as VCVTPH2PS.
 * Returns the length, 0 if it is none of them, or −1 where the same address must be executed again. */
static int fp16_instruction(ucontext_t *context, uint8_t *at) {
    if (at[0] != 0x62 || at[1] & 8) return 0;
    int map = at[1] & 7, prefix = at[2] & 3, opcode = at[4];
    int zero = at[3] >> 7, size = at[3] >> 5 & 3, repeated = at[3] >> 4 & 1, mask = at[3] & 7;
    int r = ~at[1] >> 7 & 1, x = ~at[1] >> 6 & 1, b = ~at[1] >> 5 & 1, high_r = ~at[1] >> 4 & 1;
    if (prefix != 1 || at[2] & 0x80) return 0;
    _Alignas(64) uint8_t value[64] = {0};
    if (map == 6 && opcode == 0x13 && repeated && at[5] < 0xC0) { /* VCVTPH2PSX v, m16{1to4, 8, 16} */
        Operands o = decode(context, at + 5, r, x, b, 2);
        __m256i halves = _mm256_set1_epi16(*(short *)(o.address + o.index));
        _mm512_store_ps(value, _mm512_cvtph_ps(halves));
        write_lanes(context, o.reg | high_r << 4, value, 4 << size, 4, mask, zero);
        count(FP16_CONVERSION);
        return 5 + o.length;
    }
    if (map == 6 && opcode == 0x13) { /* VCVTPH2PSX v, v/m */
        uintptr_t page = (uintptr_t)(at + 1) & ~(uintptr_t)4095;
        if (mprotect((void *)page, 4096, PROT_READ | PROT_WRITE | PROT_EXEC)) return 0;
        at[1] = (at[1] & ~7) | 2;
        count(FP16_CONVERSION);
        return -1;
    }
    if (map == 5 && opcode == 0x6E) { /* VMOVW x, r/m16 */
        Operands o = decode(context, at + 5, r, x, b, 2);
        uint64_t word = o.memory ? *(uint16_t *)(o.address + o.index) : general(context, o.rm);
        memcpy(value, &word, 2);
        write_vector(context, o.reg | high_r << 4, value);
        count(FP16_CONVERSION);
        return 5 + o.length;
    }
    if (map == 5 && opcode == 0x7E) { /* VMOVW r/m16, x */
        Operands o = decode(context, at + 5, r, x, b, 2);
        read_vector(context, o.reg | high_r << 4, value);
        if (o.memory)
            memcpy((void *)(o.address + o.index), value, 2);
        else
            context->uc_mcontext.gregs[GENERAL[o.rm]] = *(uint16_t *)value;
        count(FP16_CONVERSION);
        return 5 + o.length;
    }
    if (map == 5 && opcode == 0x1D) { /* VCVTPS2PHX v, v/m, m32{1to4, 8, 16} */
        int in_register = at[5] >= 0xC0, lanes = in_register && repeated ? 16 : 4 << size;
        Operands o = decode(context, at + 5, r, x, b, repeated ? 4 : 4 * lanes);
        if (in_register) read_vector(context, o.rm | x << 4, value);
        for (int i = 0; i < lanes && !in_register; i++) /* masked lanes are not read */
            if (read_mask(context, mask) >> i & 1)
                memcpy(value + 4 * i, (void *)(o.address + o.index + (repeated ? 0 : 4 * i)), 4);
        __m256i halves = _mm512_cvtps_ph(_mm512_load_ps(value), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        write_lanes(context, o.reg | high_r << 4, (uint8_t *)&halves, lanes, 2, mask, zero);
        count(FP16_CONVERSION);
        return 5 + o.length;
    }
    return 0;
}
