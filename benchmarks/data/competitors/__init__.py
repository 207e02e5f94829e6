"""One file a competitor, as its own documentation writes such a loader. Each has two words, both given the corpus's folder:

    prepare(corpus, rows)   the same rows in its own format, made once            (left away where it reads the tars)
    batches(corpus, rows)   batches of at least so many rows, in this process

Alike in all: `work.prepared` and `work.collate` in two workers, no shuffle (which none of them is slower without), and a cache
folder of its own.
"""
