"""What a worker writes down about a request: that it began, that it ended, and how.

Each is one script, so that it happens in one round trip and as a whole: looking whether the request is wanted
and taking its lease; completing it and giving the lease back.
"""

from __future__ import annotations

from collections.abc import Sequence

from hetrain.public.broker.blobs import BlobStore, chunk_keys
from hetrain.public.broker.connection import FULL_S, broker_errors, while_full
from hetrain.public.protocol import keys
from hetrain.public.protocol.messages import Completion

# KEYS: alive, finished, tries, done-list, lease. ARGV: report, lifetimes of done-list and tries in s, owner
# and lifetime in ms of the lease. Returns how often the request was begun, 0 if it is not to be run.
_BEGIN = """
local alive, finished, tries, done, lease = unpack(KEYS)
if redis.call('EXISTS', alive) == 0 then return 0 end
local completion = redis.call('GET', finished)
if completion then
    redis.call('RPUSH', done, completion)
    redis.call('EXPIRE', done, ARGV[2])
    return 0
end
if not redis.call('SET', lease, ARGV[4], 'NX', 'PX', ARGV[5]) then return 0 end
redis.call('RPUSH', done, ARGV[1])
redis.call('EXPIRE', done, ARGV[2])
local count = redis.call('INCR', tries)
redis.call('EXPIRE', tries, ARGV[3])
return count
"""

# KEYS: alive, finished, tries, done-list, lease, the result's chunks. ARGV: report, lifetimes of done-list
# and finished in s, whether it is final. Returns whether it was reported: not to a client that has gone, and
# not if the broker has refused a chunk.
_END = """
local alive, finished, tries, done, lease = unpack(KEYS)
if redis.call('EXISTS', alive) == 0 then
    redis.call('UNLINK', unpack(KEYS, 5))
    return 0
end
if #KEYS > 5 and redis.call('EXISTS', unpack(KEYS, 6)) < #KEYS - 5 then return 0 end
redis.call('RPUSH', done, ARGV[1])
redis.call('EXPIRE', done, ARGV[2])
if ARGV[4] == '1' then
    redis.call('SET', finished, ARGV[1], 'EX', ARGV[3])
    redis.call('DEL', tries)
end
redis.call('DEL', lease)
return 1
"""


class RequestLog:
    """The bookkeeping of one worker process, in the broker. Methods raise `BrokerError`.

    They wait for a full broker's memory for `FULL_S` seconds.

    Args:
        url: the broker's address.
        store: its connections are used.
        owner: this process, in leases.
    """

    def __init__(self, url: str, store: BlobStore, owner: str) -> None:
        self._url = url
        self._store = store
        self._owner = owner

    def begin(self, job: str, started: Completion) -> int:
        """Takes a request's lease and reports its start, unless it is not to be run.

        It is not if its client has gone, or if it is running elsewhere. A client that asks again for a
        finished request has missed its completion, so that is repeated.

        Returns:
            How often the request has been begun, this time included; 0 if it is not to be run.
        """
        report = started.to_json(), keys.DONE_TTL_S, keys.TRIES_TTL_S, self._owner, keys.LEASE_TTL_MS
        return self._call(_eval(_BEGIN, _keys(job, started.request), report))

    def end(self, job: str, completion: Completion, parts: Sequence[memoryview] | None = None) -> None:
        """Reports the end of a request and gives its lease back; uploads its result in the same round trip.

        Only success is final: a failed request may be asked for again, say after its input was lost.

        Args:
            job: whose request it is.
            completion: the report, with the `output` that `parts` become.
            parts: the result's bytes, None where there is no result.
        """
        output = completion.output
        chunks = [] if output is None else chunk_keys(output)
        is_final = int(completion.state == "done")
        report = completion.to_json(), keys.DONE_TTL_S, keys.FINISHED_TTL_S, is_final
        command = _eval(_END, [*_keys(job, completion.request), *chunks], report)
        if output is not None and parts is not None:
            self._store.put(job, output.kind, output.token, parts, then=command)
        else:
            self._call(command)

    def _call(self, command: Sequence[str | int]) -> int:
        def attempt() -> int:
            with broker_errors(self._url):
                return int(self._store.client.execute_command(*command))

        return while_full(attempt, limit_s=FULL_S)


def _keys(job: str, request: str) -> list[str]:
    return [
        keys.alive(job),
        keys.finished(job, request),
        keys.tries(job, request),
        keys.done_list(job),
        keys.lease(job, request),
    ]


def _eval(script: str, names: Sequence[str], values: Sequence[str | int]) -> list[str | int]:
    # Not by its digest: a broker that restarts forgets scripts.
    return ["EVAL", script, len(names), *names, *values]
