/*
 * What two machines fetch from each other by TCP. Each serves a stream of numbers that its own address chooses, and
 * reads the other's: nothing can be lost, doubled, late or somebody else's without a sign.
 */
#include "runtime.h"
#include "verbs.h"

#include <asm/socket.h>
#include <linux/fcntl.h>
#include <linux/if.h>
#include <linux/in.h>
#include <linux/sockios.h>
#include <linux/time_types.h>
#include <linux/wait.h>

#define PORT 5000
/* Each system call costs milliseconds where the kernel is emulated. */
#define PIECE_WORDS (256u << 10 >> 3)
/* How long the other machine may need until it listens. */
#define TRIES 300
#define TRY_EVERY_MS 200
#define REPORTS 64
/* The other machine may be away for as long. */
#define LINGER_SECONDS 300

static uint64_t piece[PIECE_WORDS];

/* An address as 172.16.0.2, in the order of the network: 1 if it is one. */
static int parse_address(const char *text, uint32_t *address)
{
	uint32_t parts = 0, value = 0;

	*address = 0;
	for (;; text++) {
		if (*text >= '0' && *text <= '9') {
			value = value * 10 + (*text - '0');
			if (value > 255)
				return 0;
			continue;
		}
		if (*text && *text != '.')
			return 0;
		*address |= value << 8 * parts++;
		value = 0;
		if (!*text || parts == 4)
			return !*text && parts == 4;
	}
}

static uint16_t big_endian(uint16_t value)
{
	return value << 8 | value >> 8;
}

/* Gives eth0 its address in a network of 24 bits, and lets it work: 0, or the negated error number. */
static long set_up(uint32_t address)
{
	struct ifreq request = { .ifr_name = "eth0" };
	struct sockaddr_in *in = (void *)&request.ifr_addr;
	long stream = call(socket, AF_INET, SOCK_DGRAM, 0), error;

	in->sin_family = AF_INET;
	in->sin_addr.s_addr = address;
	error = call(ioctl, stream, SIOCSIFADDR, &request);
	in->sin_addr.s_addr = 0x00ffffff;
	if (!error)
		error = call(ioctl, stream, SIOCSIFNETMASK, &request);
	request.ifr_flags = IFF_UP | IFF_RUNNING;
	if (!error)
		error = call(ioctl, stream, SIOCSIFFLAGS, &request);
	call(close, stream);
	return error;
}

static long listens(uint32_t address)
{
	struct sockaddr_in here = { .sin_family = AF_INET, .sin_port = big_endian(PORT), .sin_addr.s_addr = address };
	long listener = call(socket, AF_INET, SOCK_STREAM, 0), error;

	error = call(bind, listener, &here, sizeof(here));
	if (!error)
		error = call(listen, listener, 1);
	return error ? error : listener;
}

/* Closes a connection when the other side has all that was written, for this machine may end right after. */
static void close_when_acknowledged(long stream)
{
	struct {
		int on, seconds;
	} linger = { 1, LINGER_SECONDS };

	call(setsockopt, stream, SOL_SOCKET, SO_LINGER, &linger, sizeof(linger));
	call(close, stream);
}

/* Sends its stream to who comes first: 0, or the negated error number. */
static long serve(long listener, uint32_t address, uint64_t kib)
{
	long stream = call(accept, listener, 0, 0), error = stream < 0 ? stream : 0;
	uint64_t left = kib << 10, state = address;

	while (!error && left > 0) {
		uint64_t size = left < sizeof(piece) ? left : sizeof(piece);

		for (uint64_t i = 0; i < size / 8; i++)
			piece[i] = next(&state);
		left -= size;
		error = write_all(stream, piece, size);
	}
	close_when_acknowledged(stream);
	return error;
}

static long reach(uint32_t address)
{
	struct sockaddr_in there = { .sin_family = AF_INET, .sin_port = big_endian(PORT), .sin_addr.s_addr = address };
	struct __kernel_timespec rest = { .tv_nsec = TRY_EVERY_MS * 1000000 };
	long error = -ETIMEDOUT;

	for (int i = 0; i < TRIES; i++) {
		long stream = call(socket, AF_INET, SOCK_STREAM, 0);

		error = call(connect, stream, &there, sizeof(there));
		if (!error)
			return stream;
		call(close, stream);
		call(nanosleep, &rest, 0);
	}
	return error;
}

/* Reads the other's stream to its end, and says how far it is from time to time: 0 if it is all there and right. */
static int fetch(uint32_t address, uint64_t kib)
{
	long stream = reach(address), size = 0;
	uint64_t at = 0, held = 0, state = address, sum = 0, report = (kib << 10) / REPORTS, reported = 0;

	if (stream < 0) {
		say("tcp-exchange: nobody answers: error %d", -stream);
		return 1;
	}
	while ((size = call(read, stream, (char *)piece + held, sizeof(piece) - held)) > 0) {
		held += size;
		for (uint64_t i = 0; i < held / 8; i++, at += 8) {
			if (piece[i] != next(&state)) {
				say("tcp-exchange: byte %u is another one", at);
				return 1;
			}
			sum = (sum << 1 | sum >> 63) + piece[i];
		}
		/* The beginning of a number whose rest is on its way. */
		piece[0] = piece[held / 8];
		held %= 8;
		if (at / report > reported) {
			reported = at / report;
			say("tcp-exchange: %u KiB are here", at >> 10);
		}
	}
	call(close, stream);
	say("tcp-exchange: %u bytes, checksum %x, error %d", at + held, sum, -size);
	return size < 0 || at + held != kib << 10;
}

/*
 * A slow machine would send two segments at a time, for fear of bursts, and what costs here is each
 * packet, not its bytes. It does without where the kernel has no such knob.
 */
static void send_large_packets(void)
{
	long file = call(open, "/proc/sys/net/ipv4/tcp_min_tso_segs", O_WRONLY, 0);

	call(write, file, "44", 2);
	call(close, file);
}

/* HERE THERE KIB: serves so much to the machine THERE, and fetches as much from it at the same time. */
int tcp_exchange(char **words)
{
	uint32_t here, there;
	uint64_t kib;
	long error, listener, child;
	int status = 0, failed;

	if (!parse_address(words[0], &here) || !parse_address(words[1], &there) || !parse(words[2], &kib) ||
	    kib < REPORTS) {
		say("tcp-exchange takes two addresses and KiB, %u at least", (uint64_t)REPORTS);
		return 2;
	}
	send_large_packets();
	error = set_up(here);
	listener = error ? error : listens(here);
	if (listener < 0) {
		say("tcp-exchange: eth0 cannot listen: error %d", -listener);
		return 1;
	}
	child = call(fork);
	if (child == 0) {
		error = serve(listener, here, kib);
		if (error)
			say("tcp-exchange: cannot serve: error %d", -error);
		call(exit_group, error != 0);
	}
	call(close, listener);
	failed = fetch(there, kib);
	if (child < 0 || call(wait4, child, &status, 0, 0) != child || status)
		failed = 1;
	return failed;
}
