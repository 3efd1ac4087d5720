/*
 * All that init needs below its verbs: system calls and one line of text.
 *
 * There is no libc here on purpose. glibc chooses AVX string functions when the
 * processor offers them, and on a host that emulates kernel code user space
 * sees AVX while the guest kernel can only switch SSE state: the upper halves of
 * the registers are lost without a sign. This code is compiled for general
 * registers only. It also starts without a loader, in one page fault or two.
 */
#ifndef RUNTIME_H
#define RUNTIME_H

#include <asm/unistd_64.h>
#include <linux/errno.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

/* A system call: its result, or the negated error number. */
static inline long call6(long number, long a, long b, long c, long d, long e, long f)
{
	register long r10 asm("r10") = d;
	register long r8 asm("r8") = e;
	register long r9 asm("r9") = f;
	long result;

	asm volatile("syscall"
		     : "=a"(result)
		     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
		     : "rcx", "r11", "memory");
	return result;
}

/* call(write, fd, buffer, size): up to six arguments, the missing ones are 0. */
#define CALL_(number, a, b, c, d, e, f, ...)                                     \
	call6(number, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), (long)(f))
#define call(name, ...) CALL_(__NR_##name, ##__VA_ARGS__, 0, 0, 0, 0, 0, 0, 0)

/* The compiler may ask for these two whatever the flags say; weak, as every file brings them. */
__attribute__((weak)) void *memset(void *to, int byte, size_t size)
{
	void *start = to;

	asm volatile("rep stosb" : "+D"(to), "+c"(size) : "a"(byte) : "memory");
	return start;
}

__attribute__((weak)) void *memcpy(void *to, const void *from, size_t size)
{
	void *start = to;

	asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(size) : : "memory");
	return start;
}

static inline size_t length(const char *text)
{
	size_t count = 0;

	while (text[count])
		count++;
	return count;
}

static inline int same(const char *a, const char *b)
{
	while (*a && *a == *b) {
		a++;
		b++;
	}
	return *a == *b;
}

/* The part of `path` behind its last slash. */
static inline const char *basename(const char *path)
{
	const char *base = path;

	for (; *path; path++)
		if (*path == '/')
			base = path + 1;
	return base;
}

/* A number in decimal, or in hexadecimal behind 0x; stores it and returns 1, or returns 0. */
static inline int parse(const char *text, uint64_t *number)
{
	unsigned int base = 10, digit;
	uint64_t value = 0;

	if (text[0] == '0' && text[1] == 'x') {
		base = 16;
		text += 2;
	}
	if (!*text)
		return 0;
	for (; *text; text++) {
		if (*text >= '0' && *text <= '9')
			digit = *text - '0';
		else if (*text >= 'a' && *text <= 'f')
			digit = *text - 'a' + 10;
		else
			return 0;
		if (digit >= base || value > (UINT64_MAX - digit) / base)
			return 0;
		value = value * base + digit;
	}
	*number = value;
	return 1;
}

/* The next number of SplitMix64: what verbs write and send, little-endian. */
static inline uint64_t next(uint64_t *state)
{
	uint64_t word = *state += 0x9e3779b97f4a7c15;

	word = (word ^ word >> 30) * 0xbf58476d1ce4e5b9;
	word = (word ^ word >> 27) * 0x94d049bb133111eb;
	return word ^ word >> 31;
}

/* Writes all of it: 0, or the negated error number. */
static inline long write_all(long file, const void *bytes, long size)
{
	for (const char *from = bytes; size > 0;) {
		long written = call(write, file, from, size);

		if (written < 0)
			return written;
		from += written;
		size -= written;
	}
	return 0;
}

#define LINE_BYTES_MAX 1024

/* Text under construction; what does not fit is cut off. */
struct line {
	size_t used;
	char text[LINE_BYTES_MAX];
};

static inline void put(struct line *line, const char *text, size_t size)
{
	if (size > sizeof(line->text) - 1 - line->used)
		size = sizeof(line->text) - 1 - line->used;
	memcpy(line->text + line->used, text, size);
	line->used += size;
	line->text[line->used] = 0;
}

static inline void put_number(struct line *line, uint64_t number, unsigned int base)
{
	char digits[20];
	size_t at = sizeof(digits);

	do {
		digits[--at] = "0123456789abcdef"[number % base];
		number /= base;
	} while (number);
	put(line, digits + at, sizeof(digits) - at);
}

/* Appends in the manner of printf: %s, %u (uint64_t), %x (uint64_t), %d (long). */
static inline void vformat(struct line *line, const char *format, va_list values)
{
	long number;

	for (; *format; format++) {
		if (*format != '%') {
			put(line, format, 1);
			continue;
		}
		switch (*++format) {
		case 's': {
			const char *text = va_arg(values, const char *);

			put(line, text, length(text));
			break;
		}
		case 'u':
			put_number(line, va_arg(values, uint64_t), 10);
			break;
		case 'x':
			put_number(line, va_arg(values, uint64_t), 16);
			break;
		case 'd':
			number = va_arg(values, long);
			if (number < 0)
				put(line, "-", 1);
			put_number(line, number < 0 ? -(uint64_t)number : (uint64_t)number, 10);
			break;
		}
	}
}

static inline void format(struct line *line, const char *text, ...)
{
	va_list values;

	va_start(values, text);
	vformat(line, text, values);
	va_end(values);
}

/* Prints `init: …` and a newline in one write: each system call costs, each line is whole. */
static inline void say(const char *text, ...)
{
	struct line line = { 0 };
	va_list values;

	put(&line, "init: ", 6);
	va_start(values, text);
	vformat(&line, text, values);
	va_end(values);
	if (line.used == sizeof(line.text) - 1)
		line.used--;
	put(&line, "\n", 1);
	call(write, 1, line.text, line.used);
}

#endif
