/* Registers of the interrupted program, operands of an instruction, and counts of what was emulated. */
#pragma once
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

enum { CPUID, XGETBV, TILECFG, LOAD, STORE, ZERO, BF16, INT8, FP16_CONVERSION, KINDS };
static const char *const NAMES[KINDS] = {"cpuid",    "xgetbv",    "tilecfg",  "tileload",       "tilestored",
                                         "tilezero", "tdpbf16ps", "tdpb*d", "fp16_conversion"};
static unsigned long counts[KINDS];

static void count(int kind) { __atomic_fetch_add(&counts[kind], 1, __ATOMIC_RELAXED); }

/* ---- registers of the interrupted program ---- */

static const int GENERAL[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

static uint64_t general(ucontext_t *context, int number) { return context->uc_mcontext.gregs[GENERAL[number]]; }

static unsigned component_offset[8]; /* of the parts of an XSAVE area: 2: AVX  5: opmask  6 and 7: halves of ZMM */

static uint8_t *component(ucontext_t *context, int number) {
    return (uint8_t *)context->uc_mcontext.fpregs + component_offset[number];
}

static void read_vector(ucontext_t *context, int number, uint8_t out[64]) {
    uint8_t *area = (uint8_t *)context->uc_mcontext.fpregs;
    if (number >= 16) {
        memcpy(out, component(context, 7) + 64 * (number - 16), 64);
        return;
    }
    memcpy(out, area + 160 + 16 * number, 16);
    memcpy(out + 16, component(context, 2) + 16 * number, 16);
    memcpy(out + 32, component(context, 6) + 32 * number, 32);
}

static void write_vector(ucontext_t *context, int number, const uint8_t in[64]) {
    uint8_t *area = (uint8_t *)context->uc_mcontext.fpregs;
    *(uint64_t *)(area + 512) |= 0xE6; /* SSE, AVX, opmask, both halves of ZMM: in use */
    if (number >= 16) {
        memcpy(component(context, 7) + 64 * (number - 16), in, 64);
        return;
    }
    memcpy(area + 160 + 16 * number, in, 16);
    memcpy(component(context, 2) + 16 * number, in + 16, 16);
    memcpy(component(context, 6) + 32 * number, in + 32, 32);
}

static uint16_t read_mask(ucontext_t *context, int number) {
    return number ? *(uint16_t *)(component(context, 5) + 8 * number) : 0xFFFF;
}

/* ---- operands ---- */

typedef struct {
    int reg, rm;        /* 0 to 15, without EVEX's fifth bit */
    int memory;         /* whether rm is a memory operand */
    uint64_t address;   /* of the memory operand, without the index for a tile */
    uint64_t index;     /* scaled index register: the stride of a tile */
    int length;         /* bytes from ModRM to the end of the instruction */
} Operands;

/* Decodes ModRM, SIB and displacement. r, x, b: extension bits; unit: factor of an 8-bit displacement (EVEX). */
static Operands decode(ucontext_t *context, const uint8_t *modrm, int r, int x, int b, int unit) {
    Operands found = {0};
    int mod = modrm[0] >> 6, rm = modrm[0] & 7, at = 1;
    found.reg = (modrm[0] >> 3 & 7) | r << 3;
    found.rm = rm | b << 3;
    found.memory = mod != 3;
    if (found.memory) {
        int base = found.rm, no_base = 0;
        if (rm == 4) {
            uint8_t sib = modrm[at++];
            int index = (sib >> 3 & 7) | x << 3;
            base = (sib & 7) | b << 3;
            no_base = (sib & 7) == 5 && mod == 0;
            if (index != 4) found.index = general(context, index) << (sib >> 6);
        }
        int relative = rm == 5 && mod == 0;
        if (!no_base && !relative) found.address = general(context, base);
        if (mod == 1) found.address += (int64_t)(int8_t)modrm[at] * unit, at += 1;
        if (mod == 2 || no_base || relative) {
            int32_t displacement;
            memcpy(&displacement, modrm + at, 4);
            found.address += (int64_t)displacement, at += 4;
        }
        if (relative) found.address += (uint64_t)modrm + at;
    }
    found.length = at;
    return found;
}
