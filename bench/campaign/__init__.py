"""Fifteen minutes on a GPU: what is asked of it, in which order, and how nothing of the answers is lost.

``plan`` says what and in which order, ``driver`` holds the clock and the processes, ``worker`` measures cases,
``rows`` keeps the tests' outcomes. Everything is appended to one ``results.jsonl`` as it is known.
"""
