"""The bench: how fast the gateway is, measured beside what it is compared with.

* A benchmark is not a test: nothing here fails because something was slow. It fails, loudly, when a server did not
  answer what the case is about, because then the number would be about something else.
* Only ratios within one run carry over to another machine. Cases take turns over several rounds, and each ratio is
  taken within a round.
* Everything runs on loopback, for a bounded time, out of one temporary directory, and ends by its own process id.
"""
