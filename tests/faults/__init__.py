"""A whole site whose processes die, sleep and lose each other, and a checker of what is left.

Run with ``TEST_FAULTS=1`` set; it needs PostgreSQL's binaries or a server, and redis-server.

``ledgers``   what really happened, written down by those whom nobody kills
``checker``   the invariants, read from ledgers and database; usable on its own
``site``      the processes: database, Redis, web server, workers, provider, and the way between
``crash``     named points at which a process kills itself, told by CRASH_AT
``seeded``    bugs on purpose, told by SEEDED_BUG, which the checker has to find
``storm``     many requests and many faults at once; ``long`` is the same at length

Nothing in the product knows of any of this: what is wrapped or replaced, ``start`` does when one
of these processes begins.
"""

from __future__ import annotations
