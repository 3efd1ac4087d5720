/*
 * Streams to programs of the host (virtio-vsock). Each byte of a pattern says where it is, so that nothing can be lost,
 * doubled or in another place without a sign.
 */
#include "runtime.h"
#include "verbs.h"

#include <linux/vm_sockets.h>

#define BYTES_MAX (64u << 10)

static char buffer[BYTES_MAX];

static long vsock(void)
{
	return call(socket, AF_VSOCK, SOCK_STREAM, 0);
}

static struct sockaddr_vm address(uint64_t cid, uint64_t port)
{
	struct sockaddr_vm address = { .svm_family = AF_VSOCK, .svm_cid = cid, .svm_port = port };

	return address;
}

/* The number of a byte of a stream, mixed. */
static char pattern(uint64_t at)
{
	return at * 2654435761u >> 13;
}

/* Listens on a port, says so, and sends back what each caller sends, so many callers long. */
int vsock_echo(char **words)
{
	uint64_t port, callers;
	long listener, error;

	if (!parse(words[0], &port) || !parse(words[1], &callers))
		return 2;
	listener = vsock();
	struct sockaddr_vm here = address(VMADDR_CID_ANY, port);
	error = listener < 0 ? listener : call(bind, listener, &here, sizeof(here));
	if (!error)
		error = call(listen, listener, 16);
	if (error) {
		say("vsock-echo: error %d", -error);
		return 1;
	}
	say("vsock-echo listens");
	while (callers--) {
		long stream = call(accept, listener, 0, 0), size;
		uint64_t echoed = 0;

		while ((size = call(read, stream, buffer, sizeof(buffer))) > 0) {
			size = write_all(stream, buffer, size) ? -EPIPE : size;
			if (size < 0)
				break;
			echoed += size;
		}
		/* What ended it: 0 is the caller's own end, and a lost connection has a number. */
		say("vsock-echo: %u bytes, error %d", echoed, size < 0 ? -size : 0);
		call(close, stream);
	}
	call(close, listener);
	return 0;
}

/*
 * Sends so many KiB of the pattern to a port of the host, ends its half, and then
 * reads the host's half to its end, which has to be the same.
 */
int vsock_send(char **words)
{
	uint64_t port, kib, at = 0;
	long stream, error, size;

	if (!parse(words[0], &port) || !parse(words[1], &kib))
		return 2;
	stream = vsock();
	struct sockaddr_vm host = address(VMADDR_CID_HOST, port);
	error = stream < 0 ? stream : call(connect, stream, &host, sizeof(host));
	while (!error && at < kib << 10) {
		for (size = 0; size < (long)sizeof(buffer) && at < kib << 10; size++)
			buffer[size] = pattern(at++);
		error = write_all(stream, buffer, size);
	}
	if (!error)
		error = call(shutdown, stream, SHUT_WR);
	if (error) {
		say("vsock-send: error %d", -error);
		return 1;
	}
	at = 0;
	while ((size = call(read, stream, buffer, sizeof(buffer))) > 0)
		for (long i = 0; i < size; i++)
			if (buffer[i] != pattern(at++)) {
				say("vsock-send: byte %u is another one", at - 1);
				return 1;
			}
	say("vsock-send: %u bytes came back, error %d", at, size < 0 ? -size : 0);
	call(close, stream);
	return size < 0 || at != kib << 10;
}
