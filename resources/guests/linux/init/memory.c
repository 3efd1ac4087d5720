/* The verb for balloons: a program that needs memory, and then no more. */
#include "runtime.h"
#include "verbs.h"

#include <linux/mman.h>

#define PAGE_BYTES 4096

int use_memory(char **words)
{
	uint64_t mib, pages, wrong = 0;
	volatile uint64_t *memory;

	if (!parse(words[0], &mib) || mib > 1 << 20) {
		say("use-memory takes a number of MiB");
		return 2;
	}
	pages = (mib << 20) / PAGE_BYTES;
	memory = (void *)call(mmap, 0, mib << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if ((long)memory < 0) {
		say("use-memory: error %d", -(long)memory);
		return 1;
	}
	/* Another value for each page, and none of them what a fresh page has. */
	for (uint64_t page = 0; page < pages; page++)
		memory[page * PAGE_BYTES / sizeof(*memory)] = ~page;
	for (uint64_t page = 0; page < pages; page++)
		wrong += memory[page * PAGE_BYTES / sizeof(*memory)] != ~page;
	say("use-memory: %u MiB used, %u pages wrong", mib, wrong);
	call(munmap, memory, mib << 20);
	say("use-memory: given back");
	return wrong != 0;
}
