/* The verbs that write patterns and read them back. */
#include "runtime.h"
#include "verbs.h"

#include <linux/fcntl.h>

#define CHUNK_BYTES 65536

/* What the disk verbs take: FILE KIB SEED. A file without a slash is in /data. */
struct pattern {
	struct line path;
	uint64_t size_kib, seed;
};

static int pattern_from(char **words, struct pattern *pattern)
{
	format(&pattern->path, words[0][0] == '/' ? "%s" : "/data/%s", words[0]);
	if (parse(words[1], &pattern->size_kib) && parse(words[2], &pattern->seed))
		return 0;
	say("KIB and SEED are numbers, not %s and %s", words[1], words[2]);
	return 2;
}

static uint64_t chunk[CHUNK_BYTES / 8];

/* Returns what is left of `size` behind a chunk, and the chunk's size. */
static uint64_t next_chunk(uint64_t *left)
{
	uint64_t size = *left < CHUNK_BYTES ? *left : CHUNK_BYTES;

	*left -= size;
	return size;
}

long write_pattern(const char *path, uint64_t size_kib, uint64_t seed)
{
	long file = call(open, path, O_WRONLY | O_CREAT | O_TRUNC, 0644), done = file;
	uint64_t left = size_kib * 1024, state = seed;

	while (done >= 0 && left > 0) {
		uint64_t size = next_chunk(&left);

		for (uint64_t i = 0; i < size / 8; i++)
			chunk[i] = next(&state);
		done = call(write, file, chunk, size);
		if (done >= 0 && (uint64_t)done != size)
			done = -ENOSPC;
	}
	if (done >= 0)
		done = call(fsync, file);
	if (file >= 0)
		call(close, file);
	return done;
}

int disk_write(char **words)
{
	struct pattern pattern = { 0 };

	if (pattern_from(words, &pattern))
		return 2;
	const char *path = pattern.path.text;
	long done = write_pattern(path, pattern.size_kib, pattern.seed);

	if (done < 0) {
		say("cannot write %s: error %d", path, -done);
		return 1;
	}
	say("wrote %s: %u KiB, seed %u", path, pattern.size_kib, pattern.seed);
	return 0;
}

int disk_read(char **words)
{
	struct pattern pattern = { 0 };

	if (pattern_from(words, &pattern))
		return 2;
	const char *path = pattern.path.text;
	long file = call(open, path, O_RDONLY, 0), done = file;
	uint64_t left = pattern.size_kib * 1024, state = pattern.seed, offset = 0;

	while (done >= 0 && left > 0) {
		uint64_t size = next_chunk(&left);

		done = call(read, file, chunk, size);
		if (done >= 0 && (uint64_t)done != size)
			done = -ENODATA;
		for (uint64_t i = 0; done > 0 && i < size / 8; i++, offset += 8) {
			if (chunk[i] == next(&state))
				continue;
			say("%s differs from seed %u at byte %u", path, pattern.seed, offset);
			return 1;
		}
	}
	if (file >= 0)
		call(close, file);
	if (done < 0) {
		say("cannot read %s: error %d", path, -done);
		return 1;
	}
	say("verified %s: %u KiB, seed %u", path, pattern.size_kib, pattern.seed);
	return 0;
}
