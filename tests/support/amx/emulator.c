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

#include "fp16.h"
#include "state.h"

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
