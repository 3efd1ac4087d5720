/*
 * The verbs that have a file of their own. A verb is given its words, as many as
 * the table in init.c says, and returns 0 or the status to end the machine with.
 */
#ifndef VERBS_H
#define VERBS_H

int devices(char **words);
int disk_write(char **words);
int disk_read(char **words);

#endif
