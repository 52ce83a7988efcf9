"""Run an action once, after a person has approved it. Standard library only.

    AEGIS_TENANT=acme python aegis_loop.py charge-4711 '{"amount": 12.5}'

Submits the action, waits for the decision, claims the approval, runs the action and reports what
came of it. Start it again after a crash: the same key is the same action, an approval is spent by
one claim, and where nobody knows whether the action ran, a person decides.
"""

import json, os, sys, threading, time, uuid
import urllib.error, urllib.request


class Refused(Exception):
    """The server said no. `code` is its word for why, `problem` all that it said."""

    def __init__(self, status, problem):
        super().__init__(problem.get("detail") or f"HTTP status {status}")
        self.status, self.problem, self.code = status, problem, problem.get("code")


class Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: it would take the credentials and the action elsewhere."""
    redirect_request = lambda *_: None


class Aegis:
    def __init__(self, url=None, tenant=None, token=None, patience=60.0):
        url = url or os.environ.get("AEGIS_URL", "http://localhost:8000")
        self.base = url.rstrip("/") + "/api/v1/hitl/"
        self.opener = urllib.request.build_opener(Stay)
        self.patience = patience  # How long a call is tried again, in seconds.
        token = token or os.environ.get("AEGIS_TOKEN")
        tenant = tenant or os.environ.get("AEGIS_TENANT")
        self.who = {"Authorization": f"Bearer {token}"} if token else {"Tenant-Id": tenant or ""}

    def call(self, method, path, body=None, headers={}, timeout=10.0):
        """One call, tried again until it is answered. Each of them is safe to repeat: a submission
        by its key, a claim by its X-Request-Id, an outcome by its token."""
        data = None if body is None else json.dumps(body, allow_nan=False).encode()
        headers = {"X-Request-Id": str(uuid.uuid4()), **self.who, **headers}
        headers["Content-Type"] = "application/json"
        give_up, pause = time.monotonic() + self.patience, 0.2
        while True:
            request = urllib.request.Request(self.base + path, data, headers, method=method)
            try:
                with self.opener.open(request, timeout=timeout) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                with error:
                    failure = Refused(error.code, self._problem(error))
                if error.code < 500 and error.code != 429:
                    raise failure from None
            except (OSError, ValueError) as error:  # No connection, or half an answer.
                failure = error
            if time.monotonic() + pause > give_up:
                raise failure
            time.sleep(pause)
            pause = min(pause * 2, 5.0)

    @staticmethod
    def _problem(error):
        try:
            problem = json.load(error)
        except (OSError, ValueError):
            problem = None
        return problem if isinstance(problem, dict) else {}

    def submit(self, key, payload, thread="main", title=None, expires_at=None, allow_edit=False):
        about = {"title": title, "expires_at": expires_at, "allow_edit": allow_edit or None}
        about = {name: value for name, value in about.items() if value is not None}
        headers = {"Thread-Id": thread, "Idempotency-Key": key}
        return self.call("POST", "actions", {**payload, "aegis": about}, headers)

    def wait(self, id, deadline=None):
        """Waits for a decision. `deadline` is a time of `time.monotonic`."""
        while True:
            begun = time.monotonic()
            left = 50.0 if deadline is None else min(50.0, deadline - begun)
            prefer = {"Prefer": f"wait={max(0, int(left))}"}
            action = self.call("GET", f"status/{id}", headers=prefer, timeout=65.0)
            if action["status"] != "PENDING":
                return action
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"nobody has decided on {id} yet")
            if time.monotonic() - begun < left / 2:  # It does not wait, or shuts down.
                time.sleep(0.5)

    def run_once(self, action, run, lease=60):
        """Claims an approved action and runs it: `run(payload, id)`. Returns the action as it is
        then, or as somebody else left it. What runs is the payload that the claim shows."""
        id, begun = action["request_id"], time.monotonic()
        try:
            claimed = self.call(
                "POST", f"actions/{id}/claim", {"digest": action["digest"], "lease": lease}
            )
        except Refused as refused:
            if refused.code in ("already-claimed", "not-approved") and "action" in refused.problem:
                return refused.problem["action"]
            raise
        token, shown = {"token": claimed["claim"]["token"]}, claimed["action"]
        if (shown["request_id"], shown["digest"]) != (id, action["digest"]):
            raise ValueError(f"the answer to the claim on {id} is about something else")
        while time.monotonic() - begun > lease / 2:  # It took long: the lease may have ended.
            begun = time.monotonic()
            self.call("POST", f"actions/{id}/renew", {**token, "lease": lease})
        done = threading.Event()

        def renew():
            while not done.wait(lease / 3):
                try:
                    self.call("POST", f"actions/{id}/renew", {**token, "lease": lease})
                except Exception as error:
                    return print(f"aegis: {id} was not renewed: {error}", file=sys.stderr)

        threading.Thread(target=renew, daemon=True).start()
        try:
            # An edit by the reviewer is what was approved, even one to nothing.
            edited = shown.get("edited_payload")
            result = run(shown.get("payload") or {} if edited is None else edited, id)
        except Exception as error:
            verb, told = "fail", {"reason": f"{type(error).__name__}: {error}"[:4000]}
            failure = error
        else:
            verb, told, failure = "complete", {"result": result}, None
        finally:
            done.set()
        try:
            ended = self.call("POST", f"actions/{id}/{verb}", {**token, **told})
        except (TypeError, ValueError, RecursionError, Refused) as error:
            if isinstance(error, Refused) and error.status not in (400, 413):
                raise
            # What cannot be sent or kept is left out. That the action ran is what counts.
            ended = self.call("POST", f"actions/{id}/{verb}", token)
        if failure is not None:
            raise failure
        return {**ended, "result": result}


if __name__ == "__main__":
    key, payload = sys.argv[1], json.loads(sys.argv[2])
    aegis = Aegis()
    action = aegis.submit(key, payload, title=f"run {key}")
    print(f"aegis: {key} waits for a decision: {action['request_id']}", file=sys.stderr)
    action = aegis.wait(action["request_id"])
    if action["decision"] == "approve":
        # In place of the print: the call that must take effect once. Hand the id on, so that the
        # other side can refuse what it has seen.
        action = aegis.run_once(action, lambda payload, id: print("running", payload, id))
    print(json.dumps(action))
