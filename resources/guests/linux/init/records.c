/*
 * The verb for crash tests: files of which each is said to be safe, by somebody
 * who does nothing else, so that a test knows what a crash must not have cost.
 */
#include "runtime.h"
#include "verbs.h"

#include <linux/fcntl.h>
#include <linux/signal.h>
#include <linux/stat.h>

#define DIRECTORY "/data/records"

/* One file that is overwritten in such pieces again and again: data and names, and never an fsync. */
#define LOAD_BYTES 65536
#define LOAD_PIECES 32

/* Keeps the journal and the writeback busy until it is killed. No file is removed: a crash leaves no orphans. */
static void load(void)
{
	static const char *const names[] = { "/data/load-even", "/data/load-odd" };
	static char piece[LOAD_BYTES];
	long file = call(open, names[0], O_RDWR | O_CREAT, 0644);

	for (uint64_t turn = 0; file >= 0; turn++) {
		memset(piece, turn, sizeof(piece));
		call(pwrite64, file, piece, sizeof(piece), turn % LOAD_PIECES * sizeof(piece));
		call(rename, names[turn % 2], names[(turn + 1) % 2]);
	}
	say("cannot write %s: error %d", names[0], -file);
	call(exit_group, 1);
}

int records(char **words)
{
	uint64_t count, size_kib, seed;

	if (!parse(words[0], &count) || !parse(words[1], &size_kib) || !parse(words[2], &seed)) {
		say("records takes three numbers");
		return 2;
	}
	call(mkdir, DIRECTORY, 0755);
	long directory = call(open, DIRECTORY, O_RDONLY | O_DIRECTORY, 0), done = directory;
	long child = call(fork);

	if (child == 0)
		load();
	for (uint64_t number = 1; done >= 0 && number <= count; number++) {
		struct line path = { 0 };

		format(&path, DIRECTORY "/%u", number);
		done = write_pattern(path.text, size_kib, seed + number);
		if (done >= 0)
			done = call(fsync, directory);
		if (done >= 0)
			say("record %u", number);
	}
	if (child > 0)
		call(kill, child, SIGKILL);
	if (done < 0)
		say("cannot write records: error %d", -done);
	return done < 0;
}
