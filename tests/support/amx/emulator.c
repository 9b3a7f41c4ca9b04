/* Emulates the AMX instructions of Sapphire Rapids on a CPU that has AVX-512 only. Preloaded by __main__.py.
 *
 * 1. After each dlopen, the `cpuid` and `xgetbv` instructions listed in $AMX_SITES (oneDNN, cpuinfo, ONNX Runtime) are
 *    replaced by `ud2`. The handler of SIGILL answers them as a Xeon with AMX would.
 * 2. oneDNN then generates AMX code, each instruction of which raises SIGILL. The handler decodes and computes it.
 *    Instructions that follow directly are computed in the same signal. A few AVX512-FP16 conversions, which such CPUs
 *    also have, are computed or rewritten as their AVX-512F equivalents.
 * 3. `syscall` grants the use of tile registers; `sigaction` keeps the handler when Python's faulthandler sets its own.
 *
 * Numbers of emulated instructions are appended to the file $AMX_COUNTS when a process exits.
 * Semantics: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, and the Instruction Set Extensions
 * Programming Reference, chapter AMX.
 */
#define _GNU_SOURCE
#include <cpuid.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <immintrin.h>
#include <link.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { TILES = 8, ROWS = 16, ROW_BYTES = 64 };
enum { MOST_SITES = 4096, MOST_LIBRARIES = 16 };

/* ---- state ---- */

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} Config; /* the 64 bytes that LDTILECFG reads */

static __thread struct {
    Config config;
    _Alignas(64) uint8_t tile[TILES][ROWS][ROW_BYTES];
} amx;

typedef struct {
    char path[512];
    uintptr_t offset[MOST_SITES];
    char kind[MOST_SITES]; /* c: cpuid  x: xgetbv */
    int sites;
    uintptr_t base; /* 0 until it is loaded and patched */
} Library;

static Library *libraries;
static int library_count;
static struct sigaction next_action; /* what the program itself wants to happen on SIGILL */
static int installed;

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

/* ---- tile instructions ---- */

static int shape_of(int tile, int *rows, int *row_bytes) {
    *rows = amx.config.rows[tile], *row_bytes = amx.config.row_bytes[tile];
    return amx.config.palette == 1 && *rows && *row_bytes;
}

static int configure(const Config *config) {
    static const Config none;
    int valid = config->palette <= 1;
    for (int i = 0; i < 14; i++) valid &= !config->reserved[i];
    for (int i = 0; i < 16; i++) {
        int rows = config->rows[i], row_bytes = config->row_bytes[i];
        valid &= rows <= ROWS && row_bytes <= ROW_BYTES && !rows == !row_bytes && (i < TILES || !rows);
    }
    if (!valid && config->palette) return 0;
    amx.config = config->palette ? *config : none;
    memset(amx.tile, 0, sizeof amx.tile);
    return 1;
}

static int load_tile(int tile, uint64_t address, uint64_t stride) {
    int rows, row_bytes;
    if (!shape_of(tile, &rows, &row_bytes)) return 0;
    memset(amx.tile[tile], 0, sizeof amx.tile[tile]);
    for (int row = 0; row < rows; row++) memcpy(amx.tile[tile][row], (void *)(address + row * stride), row_bytes);
    return 1;
}

static int store_tile(int tile, uint64_t address, uint64_t stride) {
    int rows, row_bytes;
    if (!shape_of(tile, &rows, &row_bytes)) return 0;
    for (int row = 0; row < rows; row++) memcpy((void *)(address + row * stride), amx.tile[tile][row], row_bytes);
    return 1;
}

/* Returns whether the shapes of a product fit: (rows, K) · (K, columns) added to (rows, columns). */
static int product_shape(int c, int a, int b, int *rows, int *inner) {
    int c_bytes, a_rows, a_bytes, b_rows, b_bytes;
    int configured = shape_of(c, rows, &c_bytes) & shape_of(a, &a_rows, &a_bytes) & shape_of(b, &b_rows, &b_bytes);
    *inner = a_bytes / 4;
    return configured && *rows == a_rows && *inner == b_rows && c_bytes == b_bytes && c != a && c != b && a != b;
}

/* C += A · B of pairs of bf16. Even and odd elements have an fp32 accumulator each; DAZ, FTZ, round to nearest even. */
static int multiply_bf16(int c, int a, int b) {
    int rows, inner;
    if (!product_shape(c, a, b, &rows, &inner)) return 0;
    unsigned mxcsr = _mm_getcsr();
    _mm_setcsr(0x9FC0);
    __m512i high = _mm512_set1_epi32(0xFFFF0000);
    for (int m = 0; m < rows; m++) {
        __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
        for (int k = 0; k < inner; k++) {
            __m512i x = _mm512_set1_epi32(((int *)amx.tile[a][m])[k]), y = _mm512_load_si512(amx.tile[b][k]);
            even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)),
                                   _mm512_castsi512_ps(_mm512_slli_epi32(y, 16)), even);
            odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(x, high)),
                                  _mm512_castsi512_ps(_mm512_and_si512(y, high)), odd);
        }
        __m512 sum = _mm512_add_ps(even, odd);
        __mmask16 columns = (1u << amx.config.row_bytes[c] / 4) - 1;
        _mm512_store_ps(amx.tile[c][m], _mm512_maskz_add_ps(columns, _mm512_load_ps(amx.tile[c][m]), sum));
    }
    _mm_setcsr(mxcsr);
    return 1;
}

/* C += A · B of quadruples of 8-bit integers, in int32 without saturation. */
static int multiply_int8(int c, int a, int b, int a_signed, int b_signed) {
    int rows, inner;
    if (!product_shape(c, a, b, &rows, &inner)) return 0;
    for (int m = 0; m < rows; m++)
        for (int k = 0; k < inner * 4; k++) {
            uint8_t x = amx.tile[a][m][k];
            int left = a_signed ? (int8_t)x : x;
            for (int n = 0; n < ROW_BYTES / 4; n++) {
                uint8_t y = amx.tile[b][k / 4][4 * n + k % 4];
                ((uint32_t *)amx.tile[c][m])[n] += (uint32_t)(left * (b_signed ? (int8_t)y : y));
            }
        }
    return 1;
}

/* Emulates a tile instruction (VEX.128.0F38.W0) and returns its length, or 0. */
static int tile_instruction(ucontext_t *context, const uint8_t *at) {
    if (at[0] != 0xC4 || (at[1] & 0x1F) != 2 || at[2] & 0x84) return 0;
    int prefix = at[2] & 3; /* 0: none  1: 66  2: F3  3: F2 */
    int opcode = at[3], third = ~(at[2] >> 3) & 15;
    if (opcode != 0x49 && opcode != 0x4B && opcode != 0x5C && opcode != 0x5E) return 0;
    Operands o = decode(context, at + 4, ~at[1] >> 7 & 1, ~at[1] >> 6 & 1, ~at[1] >> 5 & 1, 1);
    int done = 0, kind = TILECFG;
    if (opcode == 0x49 && o.memory && prefix == 0) done = configure((Config *)(o.address + o.index));
    if (opcode == 0x49 && o.memory && prefix == 1) done = memcpy((void *)(o.address + o.index), &amx.config, 64) != 0;
    if (opcode == 0x49 && !o.memory && prefix == 0 && at[4] == 0xC0) done = configure(&(Config){0});
    int tiles = o.reg < TILES && (o.memory || o.rm < TILES) && third < 16;
    if (opcode == 0x49 && !o.memory && prefix == 3 && tiles) {
        int rows, row_bytes;
        kind = ZERO, done = shape_of(o.reg, &rows, &row_bytes);
        if (done) memset(amx.tile[o.reg], 0, sizeof amx.tile[o.reg]);
    }
    if (opcode == 0x4B && o.memory && (at[4] & 7) == 4 && tiles) {
        if (prefix == 1 || prefix == 3) kind = LOAD, done = load_tile(o.reg, o.address, o.index);
        if (prefix == 2) kind = STORE, done = store_tile(o.reg, o.address, o.index);
    }
    if (opcode >= 0x5C && !o.memory && tiles && third < TILES) {
        if (opcode == 0x5C && prefix == 2) kind = BF16, done = multiply_bf16(o.reg, o.rm, third);
        if (opcode == 0x5E) kind = INT8, done = multiply_int8(o.reg, o.rm, third, prefix >> 1, prefix & 1);
    }
    if (done) count(kind);
    return done ? 4 + o.length : 0;
}

/* ---- AVX512-FP16: the conversions that oneDNN uses ---- */

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

/* ---- cpuid and xgetbv ---- */

/* Answers cpuid as this CPU does, with the name, caches and features of a Sapphire Rapids. */
static void answer_cpuid(ucontext_t *context) {
    greg_t *registers = context->uc_mcontext.gregs;
    unsigned leaf = registers[REG_RAX], sub = registers[REG_RCX], a, b, c, d, last = __get_cpuid_max(0, NULL);
    __cpuid_count(leaf, sub, a, b, c, d);
    if (leaf > last && leaf < 0x80000000u) a = b = c = d = 0;
    if (leaf == 0) a = 0x20, b = 0x756E6547, d = 0x49656E69, c = 0x6C65746E; /* GenuineIntel */
    if (leaf == 1) a = 0x806F8;
    if (leaf == 4) { /* level, sets − 1, and line, partitions, ways */
        static const unsigned caches[4][3] = {{0x121, 63, 12}, {0x122, 63, 8}, {0x143, 2047, 16}, {0x163, 32767, 15}};
        a = sub < 4 ? caches[sub][0] : 0, b = sub < 4 ? 63 | (caches[sub][2] - 1) << 22 : 0;
        c = sub < 4 ? caches[sub][1] : 0, d = 0;
    }
    if (leaf == 7 && sub == 0) a = a ? a : 1, d |= 0xF << 22; /* AMX-BF16, AVX512-FP16, AMX-TILE, AMX-INT8 */
    if (leaf == 7 && sub == 1) a |= 1 << 4;                   /* AVX-VNNI, which oneDNN requires of such a CPU */
    if (leaf == 0xD && sub == 0) a |= 3 << 17, c = 11008;
    if (leaf == 0xD && sub == 17) a = 64, b = 2752, c = d = 0;
    if (leaf == 0xD && sub == 18) a = 8192, b = 2816, c = 6, d = 0;
    if (leaf == 0x1D && sub == 0) a = 1;
    if (leaf == 0x1D && sub == 1) a = 8192 | 1024 << 16, b = ROW_BYTES | TILES << 16, c = ROWS;
    if (leaf == 0x1E && sub == 0) b = 16 | 64 << 8;
    registers[REG_RAX] = a, registers[REG_RBX] = b, registers[REG_RCX] = c, registers[REG_RDX] = d;
}

static void answer_xgetbv(ucontext_t *context) {
    greg_t *registers = context->uc_mcontext.gregs;
    unsigned a, d, which = registers[REG_RCX];
    __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(which));
    registers[REG_RAX] = which ? a : a | 3 << 17, registers[REG_RDX] = d;
}

static int patched_instruction(ucontext_t *context, const uint8_t *at) {
    for (int i = 0; i < library_count; i++)
        for (int s = 0; libraries[i].base && s < libraries[i].sites; s++) {
            if (libraries[i].base + libraries[i].offset[s] != (uintptr_t)at) continue;
            int is_cpuid = libraries[i].kind[s] == 'c';
            is_cpuid ? answer_cpuid(context) : answer_xgetbv(context);
            count(is_cpuid ? CPUID : XGETBV);
            return is_cpuid ? 2 : 3;
        }
    return 0;
}

/* ---- signals ---- */

static void on_illegal_instruction(int number, siginfo_t *info, void *frame) {
    ucontext_t *context = frame;
    greg_t *rip = &context->uc_mcontext.gregs[REG_RIP];
    for (int emulated = 0;; emulated++) {
        uint8_t *at = (uint8_t *)*rip;
        int length = at[0] == 0xC4 ? tile_instruction(context, at) : 0;
        if (!length && at[0] == 0x62) length = fp16_instruction(context, at);
        if (!length && at[0] == 0x0F) length = patched_instruction(context, at);
        if (length > 0) *rip += length;
        if (length < 0 || (!length && emulated)) return; /* back to the program */
        if (!length) break;
    }
    char text[160];
    const uint8_t *at = (uint8_t *)*rip;
    int size = snprintf(text, sizeof text, "amx emulator: not emulated: %02x %02x %02x %02x %02x %02x %02x %02x %02x %02x\n",
                        at[0], at[1], at[2], at[3], at[4], at[5], at[6], at[7], at[8], at[9]);
    if (write(2, text, size) < 0) _exit(132);
    if (next_action.sa_flags & SA_SIGINFO && next_action.sa_sigaction) next_action.sa_sigaction(number, info, frame);
    signal(SIGILL, SIG_DFL); /* ends the process when the instruction is executed again */
    installed = 0;
}

static int real_sigaction(int number, const struct sigaction *action, struct sigaction *old) {
    int (*real)(int, const struct sigaction *, struct sigaction *) = dlsym(RTLD_NEXT, "sigaction");
    return real(number, action, old);
}

int sigaction(int number, const struct sigaction *action, struct sigaction *old) {
    if (number != SIGILL || !installed) return real_sigaction(number, action, old);
    struct sigaction before = next_action;
    if (action) next_action = *action;
    if (old) *old = before;
    return 0;
}

/* ---- start ---- */

static int patch_library(struct dl_phdr_info *info, size_t size, void *unused) {
    (void)size, (void)unused;
    char path[PATH_MAX];
    if (!info->dlpi_name || !realpath(info->dlpi_name, path)) return 0;
    for (int i = 0; i < library_count; i++) {
        Library *library = &libraries[i];
        if (library->base || strcmp(path, library->path)) continue;
        for (int s = 0; s < library->sites; s++) {
            uint8_t *at = (uint8_t *)(info->dlpi_addr + library->offset[s]);
            int is_cpuid = library->kind[s] == 'c';
            if (at[0] != 0x0F || at[1] != (is_cpuid ? 0xA2 : 0x01) || (!is_cpuid && at[2] != 0xD0)) {
                fprintf(stderr, "amx emulator: %s changed since its sites were listed\n", library->path);
                _exit(2);
            }
            uintptr_t page = (uintptr_t)at & ~(uintptr_t)4095;
            if (mprotect((void *)page, 8192, PROT_READ | PROT_WRITE | PROT_EXEC)) perror("amx emulator: mprotect");
            at[1] = 0x0B; /* ud2 */
            mprotect((void *)page, 8192, PROT_READ | PROT_EXEC);
        }
        library->base = info->dlpi_addr;
        if (!installed) {
            struct sigaction action = {.sa_sigaction = on_illegal_instruction, .sa_flags = SA_SIGINFO | SA_NODEFER};
            real_sigaction(SIGILL, &action, &next_action);
            installed = 1;
        }
    }
    return 0;
}

void *dlopen(const char *path, int mode) {
    static void *(*real)(const char *, int);
    if (!real) real = dlsym(RTLD_NEXT, "dlopen");
    void *handle = real(path, mode);
    if (library_count) dl_iterate_phdr(patch_library, NULL);
    return handle;
}

/* Grants the use of tile registers: ARCH_GET_XCOMP_PERM and ARCH_REQ_XCOMP_PERM. */
long syscall(long number, ...) {
    va_list arguments;
    va_start(arguments, number);
    long a[6];
    for (int i = 0; i < 6; i++) a[i] = va_arg(arguments, long);
    va_end(arguments);
    if (number == SYS_arch_prctl && a[0] == 0x1023 && (a[1] == 17 || a[1] == 18)) return 0;
    static long (*real)(long, ...);
    if (!real) real = dlsym(RTLD_NEXT, "syscall");
    long result = real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
    if (number == SYS_arch_prctl && a[0] == 0x1022 && !result) *(unsigned long *)a[1] |= 3 << 17;
    return result;
}

static void forget_counts(void) { memset(counts, 0, sizeof counts); }

__attribute__((constructor)) static void start(void) {
    const char *sites = getenv("AMX_SITES");
    FILE *file = sites ? fopen(sites, "r") : NULL;
    if (!file) return;
    libraries = calloc(MOST_LIBRARIES, sizeof *libraries);
    char path[512], kind;
    unsigned long offset;
    while (fscanf(file, "%511[^\t]\t%c\t%lx\n", path, &kind, &offset) == 3) {
        Library *library = library_count ? &libraries[library_count - 1] : NULL;
        if (!library || strcmp(library->path, path)) {
            if (library_count == MOST_LIBRARIES) break;
            library = &libraries[library_count++];
            strcpy(library->path, path);
        }
        if (library->sites == MOST_SITES) break;
        library->kind[library->sites] = kind;
        library->offset[library->sites++] = offset;
    }
    fclose(file);
    unsigned a, c, d;
    for (int i = 2; i < 8; i++) __cpuid_count(0xD, i, a, component_offset[i], c, d);
    pthread_atfork(NULL, NULL, forget_counts); /* a child counts its own */
    dl_iterate_phdr(patch_library, NULL);
}

__attribute__((destructor)) static void finish(void) {
    const char *path = getenv("AMX_COUNTS");
    if (!path || !installed) return;
    char line[512];
    int size = snprintf(line, sizeof line, "%d", getpid());
    for (int i = 0; i < KINDS; i++) size += snprintf(line + size, sizeof line - size, "\t%s=%lu", NAMES[i], counts[i]);
    line[size++] = '\n';
    int file = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (file < 0 || write(file, line, size) < 0) perror("amx emulator: AMX_COUNTS");
    if (file >= 0) close(file);
}
