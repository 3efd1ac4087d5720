/* The verb that shows what the kernel found: /sys read as far as it names devices. */
#include "runtime.h"
#include "verbs.h"

#include <linux/fcntl.h>

/* The contents of a small file without its newline; "" if there is none. */
static const char *small_file(const char *path, char *text, size_t size)
{
	long file = call(open, path, O_RDONLY, 0), count = -1;

	if (file >= 0) {
		count = call(read, file, text, size - 1);
		call(close, file);
	}
	if (count > 0 && text[count - 1] == '\n')
		count--;
	text[count > 0 ? count : 0] = 0;
	return text;
}

static const char *link_target(const char *path, char *text, size_t size)
{
	long count = call(readlink, path, text, size - 1);

	text[count > 0 ? count : 0] = 0;
	return text;
}

/* Calls `visit` for each name in a directory; how many there were, or -1. */
static long each_entry(const char *path, void (*visit)(const char *name))
{
	struct entry {
		uint64_t inode, offset;
		uint16_t size;
		uint8_t kind;
		char name[];
	};
	_Alignas(8) char entries[2048];
	long directory = call(open, path, O_RDONLY | O_DIRECTORY, 0), size, count = 0;

	if (directory < 0)
		return -1;
	while ((size = call(getdents64, directory, entries, sizeof(entries))) > 0) {
		for (long at = 0; at < size; at += ((struct entry *)(entries + at))->size) {
			const char *name = ((struct entry *)(entries + at))->name;

			if (name[0] == '.')
				continue;
			count++;
			visit(name);
		}
	}
	call(close, directory);
	return count;
}

static int unbound;

static void show_virtio(const char *name)
{
	char id[32], target[256], driver[256];
	struct line path = { 0 };
	uint64_t number = 0;

	format(&path, "/sys/bus/virtio/devices/%s", name);
	size_t directory = path.used;
	link_target(path.text, target, sizeof(target));
	format(&path, "/device");
	parse(small_file(path.text, id, sizeof(id)), &number);
	path.used = directory;
	format(&path, "/driver");
	const char *bound = basename(link_target(path.text, driver, sizeof(driver)));

	unbound += !*bound;
	/* target is ../../../devices/platform/…/virtioN */
	say("device %s id %u driver %s at %s", name, number, *bound ? bound : "none",
	    target[0] == '.' ? target + 9 : target);
}

static int found_vmgenid;

static void show_vmgenid(const char *name)
{
	for (const char *at = name; *at; at++) {
		if (*at == ':') {
			found_vmgenid = 1;
			say("vmgenid at %s", name);
		}
	}
}

/* Shows what is there; fails only if a virtio device has no driver. */
int devices(char **words)
{
	uint8_t random[16];

	(void)words;
	each_entry("/sys/bus/virtio/devices", show_virtio);
	long file = call(open, "/dev/hwrng", O_RDONLY, 0);
	long count = file < 0 ? file : call(read, file, random, sizeof(random));
	say(count > 0 ? "hwrng delivers" : "hwrng absent");
	if (file >= 0)
		call(close, file);
	each_entry("/sys/bus/acpi/drivers/vmgenid", show_vmgenid);
	if (!found_vmgenid)
		say("vmgenid absent");
	return unbound != 0;
}
