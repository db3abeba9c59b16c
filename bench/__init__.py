"""The bench measures how fast the gateway is, next to servers that it is compared with.

* A benchmark is not a test: it never fails because something was slow. It fails if a server's answers are not the ones
  that the case measures.
* Only ratios within one run can be compared between machines. Cases take turns over several rounds, and each ratio is
  computed within a round.
* Everything runs on loopback, for a bounded time, in one temporary directory, and is ended by its process id.
"""
