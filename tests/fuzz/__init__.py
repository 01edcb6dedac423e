"""A fuzzer: random calls of everything public and of the extension, in child processes.

``make fuzz`` runs it, ``python -m tests.fuzz --help`` lists its options. A call is a line of Python, made of the
functions in :mod:`tests.fuzz.make`, so that what it prints of a failure can be run as it stands.

- ``targets``: what is called, found by introspection, and valid arguments for it
- ``calls``: a random call, from valid arguments and what is wrong with them
- ``make``: what the text of a call is made of
- ``outcome``: how a call ended, and which errors are clear
- ``children``: runs calls in child processes, with limits of time and memory
- ``adapter_files``: files of adapters, mutated
- ``concurrency``: threads, fork, Ctrl-C, an input that another thread resizes
- ``report``: the table and the reproductions
"""
