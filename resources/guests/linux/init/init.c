/*
 * The first and usually only process of the Linux guest: does what the words
 * behind ` -- ` on the kernel command line say, then ends the machine with a status.
 *
 *     … root=/dev/vda rw -- hello disk-write log 64 7 exit 3
 *
 * It does the work itself because each exec costs half a second where the host
 * emulates kernel code. README.md lists the verbs; `table` below is the truth.
 */
#include "runtime.h"
#include "verbs.h"

#include <linux/fcntl.h>
#include <linux/mman.h>
#include <linux/mount.h>
#include <linux/poll.h>
#include <linux/reboot.h>
#include <linux/signal.h>
#include <linux/time_types.h>
#include <linux/utsname.h>
#include <linux/wait.h>
#include <asm/ioctls.h>

/* The monitor ends with the status that is written to this port. */
#define EXIT_PORT 0x604

/* What the ACPI power button sends to process 1 (CONFIG_ACPI_TINY_POWER_BUTTON_SIGNAL). */
#define SIGNAL_POWER_BUTTON 38

#define CPUS_MAX 64
#define COMMAND_BYTES_MAX 2048
#define MEET_SECONDS_MAX 20

enum ending { END_EXIT, END_POWER_OFF, END_REBOOT };

static char **environment;
static int signals_fd;

/* Ends the machine: file systems clean, then the status, then the power. Never returns. */
static void finish(enum ending ending, uint64_t status)
{
	long error;

	call(sync);
	error = call(mount, 0, "/", 0, MS_REMOUNT | MS_RDONLY, 0);
	if (error && error != -EINVAL)
		say("cannot make / read-only: error %d", -error);
	/* The last lines are still on their way through the serial driver; the exit port would cut them off. */
	call(ioctl, 1, TCSBRK, 1);
	if (ending == END_EXIT && call(ioperm, EXIT_PORT, 1, 1) == 0)
		asm volatile("outb %b0, %w1" : : "a"(status), "Nd"(EXIT_PORT));

	/* No exit device in this machine, or none was wanted. */
	if (ending == END_EXIT)
		say("exit status %u", status);
	call(reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2,
	     ending == END_POWER_OFF ? LINUX_REBOOT_CMD_POWER_OFF : LINUX_REBOOT_CMD_RESTART, 0);
	for (;;)
		call(pause);
}

/*
 * Waits until a signal arrives, the console has input or the time is over
 * (never, if negative). A request to stop ends the machine from in here.
 * Returns 1 if the console has input.
 */
static int wait_event(int console, long timeout_ms)
{
	struct pollfd sources[2] = { { signals_fd, POLLIN, 0 }, { console, POLLIN, 0 } };
	struct signalfd {
		uint32_t number;
		uint8_t rest[124];
	} signal;

	call(poll, sources, 2, timeout_ms);
	if (sources[0].revents && call(read, signals_fd, &signal, sizeof(signal)) == sizeof(signal)) {
		if (signal.number == SIGINT) {
			say("stopped by Ctrl-Alt-Del");
			finish(END_REBOOT, 0);
		}
		if (signal.number == SIGNAL_POWER_BUTTON) {
			say("stopped by the power button");
			finish(END_POWER_OFF, 0);
		}
	}
	return sources[1].revents != 0;
}

#define ANY_CHILD (-1)

/* The status of a child as a shell would give it; reaps orphans on the way. */
static int wait_child(long child)
{
	int status;
	long pid;

	for (;;) {
		while ((pid = call(wait4, -1, &status, WNOHANG, 0)) > 0)
			if (child == ANY_CHILD || pid == child)
				return status & 0x7f ? 128 + (status & 0x7f) : status >> 8 & 0xff;
		if (pid == -ECHILD)
			return 127;
		wait_event(-1, -1);
	}
}

static void set_signals(unsigned int how)
{
	uint64_t set = 1ull << (SIGINT - 1) | 1ull << (SIGCHLD - 1) | 1ull << (SIGNAL_POWER_BUTTON - 1);

	call(rt_sigprocmask, how, &set, 0, sizeof(set));
	if (how == SIG_BLOCK)
		signals_fd = call(signalfd4, -1, &set, sizeof(set), O_CLOEXEC);
}

enum terminal { NO_TERMINAL, HAS_TERMINAL };

/*
 * Runs a program in a session of its own on the console; its status. Who has the
 * console for its terminal takes along, when it ends, what the console has not
 * printed yet: its last words can be lost.
 */
static int program(const char *path, char *const arguments[], enum terminal terminal)
{
	long child = call(fork);

	if (child == 0) {
		set_signals(SIG_UNBLOCK);
		call(setsid);
		if (terminal == HAS_TERMINAL)
			call(ioctl, 0, TIOCSCTTY, 0);
		long error = call(execve, path, arguments, environment);
		say("cannot run %s: error %d", path, -error);
		call(exit_group, 127);
	}
	return child < 0 ? 127 : wait_child(child);
}

static int busybox(char *const arguments[], enum terminal terminal)
{
	return program("/bin/busybox", arguments, terminal);
}

static int shell(char **words)
{
	(void)words;
	say("a shell; `exit N` ends the machine with status N");
	return busybox((char *[]){ "sh", "-l", 0 }, HAS_TERMINAL);
}

/* Serves `coraclectl exec` and `cp` until the machine is asked to stop. */
static int agent(char **words)
{
	(void)words;
	call(mkdir, "/dev/pts", 0755);
	call(mount, "devpts", "/dev/pts", "devpts", 0, "ptmxmode=0666");
	return program("/sbin/coracle-agent", (char *[]){ "coracle-agent", 0 }, NO_TERMINAL);
}

/* Takes all the words that are left. */
static int run(char **words)
{
	static char command[COMMAND_BYTES_MAX];
	size_t used = 0;

	for (; *words; words++) {
		size_t size = length(*words);

		if (used + size + 2 > sizeof(command)) {
			say("run: longer than %u bytes", (uint64_t)sizeof(command));
			return 2;
		}
		memcpy(command + used, *words, size);
		used += size;
		command[used++] = ' ';
	}
	return busybox((char *[]){ "sh", "-c", command, 0 }, NO_TERMINAL);
}

static uint64_t online_cpus(uint64_t *first)
{
	uint64_t set[CPUS_MAX / 64] = { 0 }, count = 0;

	call(sched_getaffinity, 0, sizeof(set), set);
	*first = set[0];
	for (uint64_t left = set[0]; left; left &= left - 1)
		count++;
	return count;
}

static int hello(char **words)
{
	struct new_utsname name;
	uint64_t set;

	(void)words;
	call(uname, &name);
	say("hello from Linux %s, CPUs online: %u", name.release, online_cpus(&set));
	return 0;
}

/*
 * One process for each CPU, bound to it; all of them must be running at the
 * same time to meet, which nothing less than that many CPUs can do in time.
 */
static int cpus(char **words)
{
	uint64_t set, count = online_cpus(&set), failed = 0;
	long started = 0;
	volatile uint64_t *met = (void *)call(mmap, 0, 4096, PROT_READ | PROT_WRITE,
					      MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	(void)words;
	for (uint64_t cpu = 0; cpu < CPUS_MAX; cpu++) {
		if (!(set >> cpu & 1))
			continue;
		started++;
		if (call(fork) == 0) {
			struct __kernel_timespec now, start;
			uint64_t mine = 1ull << cpu;
			unsigned int here = CPUS_MAX;

			call(sched_setaffinity, 0, sizeof(mine), &mine);
			call(getcpu, &here, 0, 0);
			__atomic_add_fetch(met, 1, __ATOMIC_SEQ_CST);
			call(clock_gettime, 1 /* CLOCK_MONOTONIC */, &start);
			for (now = start; *met < count; call(clock_gettime, 1, &now))
				if (now.tv_sec - start.tv_sec > MEET_SECONDS_MAX)
					call(exit_group, 2);
			say("cpu %u runs", (uint64_t)here);
			call(exit_group, here != cpu);
		}
	}
	while (started--)
		failed += wait_child(ANY_CHILD) != 0;
	say("cpus: %u met, %u failed", (uint64_t)*met, failed);
	return failed != 0;
}

/* Counts aloud until a byte comes from the console. */
static int count(char **words)
{
	uint64_t interval_ms, number = 0;
	char byte;

	if (!parse(words[0], &interval_ms))
		return 2;
	do
		say("count %u", number++);
	while (!wait_event(0, interval_ms));
	call(read, 0, &byte, 1);
	say("count stopped");
	return 0;
}

static int exit_with(char **words)
{
	uint64_t status;

	if (!parse(words[0], &status) || status > 255)
		return 2;
	finish(END_EXIT, status);
	return 0;
}

static int power_off(char **words)
{
	(void)words;
	finish(END_POWER_OFF, 0);
	return 0;
}

static int restart(char **words)
{
	(void)words;
	finish(END_REBOOT, 0);
	return 0;
}

#define ALL_THE_REST (-1)

/* A verb, how many words it takes behind it, and what it does: 0, or the status to end with. */
static const struct verb {
	const char *name;
	int words;
	int (*act)(char **words);
} table[] = {
	{ "hello", 0, hello },
	{ "devices", 0, devices },
	{ "cpus", 0, cpus },
	{ "disk-write", 3, disk_write },
	{ "disk-read", 3, disk_read },
	{ "records", 3, records },
	{ "use-memory", 1, use_memory },
	{ "tcp-exchange", 3, tcp_exchange },
	{ "vsock-echo", 2, vsock_echo },
	{ "vsock-send", 2, vsock_send },
	{ "count", 1, count },
	{ "agent", 0, agent },
	{ "shell", 0, shell },
	{ "run", ALL_THE_REST, run },
	{ "exit", 1, exit_with },
	{ "poweroff", 0, power_off },
	{ "reboot", 0, restart },
};

/* Does one verb and moves past its words; the status, 2 if it makes no sense. */
static int step(char ***words)
{
	const char *name = *(*words)++;

	for (size_t i = 0; i < sizeof(table) / sizeof(table[0]); i++) {
		char **arguments = *words;

		if (!same(table[i].name, name))
			continue;
		for (int left = table[i].words; left && **words; left--)
			(*words)++;
		if (table[i].words > 0 && *words - arguments < table[i].words) {
			say("%s takes %u words", name, (uint64_t)table[i].words);
			return 2;
		}
		return table[i].act(arguments);
	}
	say("%s is no verb", name);
	return 2;
}

static void prepare(void)
{
	call(mount, "proc", "/proc", "proc", 0, 0);
	call(mount, "sysfs", "/sys", "sysfs", 0, 0);
	call(mount, "devtmpfs", "/dev", "devtmpfs", 0, 0);
	call(mount, "tmpfs", "/tmp", "tmpfs", 0, 0);
	call(sethostname, "coracle", 7);
	/* Ctrl-Alt-Del comes as SIGINT instead of ending the machine with dirty disks. */
	call(reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, LINUX_REBOOT_CMD_CAD_OFF, 0);
	set_signals(SIG_BLOCK);
}

__attribute__((used)) static void start(uint64_t *stack)
{
	uint64_t count = stack[0];
	char **words = (char **)(stack + 2);
	int status = 0;

	environment = (char **)(stack + 2 + count);
	prepare();
	if (!*words)
		status = shell(words);
	while (*words && status == 0)
		status = step(&words);
	finish(END_EXIT, status);
}

/* Where the kernel enters: the stack holds argc, argv and the environment. */
asm(".globl _start\n"
    "_start: xor %ebp, %ebp\n"
    "	mov %rsp, %rdi\n"
    "	and $-16, %rsp\n"
    "	call start\n");
