/*
 * The verbs that have a file of their own. A verb is given its words, as many as
 * the table in init.c says, and returns 0 or the status to end the machine with.
 */
#ifndef VERBS_H
#define VERBS_H

#include <stdint.h>

int devices(char **words);
int disk_write(char **words);
int disk_read(char **words);
int records(char **words);
int use_memory(char **words);
int tcp_exchange(char **words);
int vsock_echo(char **words);
int vsock_send(char **words);

/* Writes a file with the pattern of a seed, safe when this returns: 0, or the negated error number. */
long write_pattern(const char *path, uint64_t size_kib, uint64_t seed);

#endif
