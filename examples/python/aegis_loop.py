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


class Aegis:
    def __init__(self, url=None, tenant=None, token=None, patience=60.0):
        url = url or os.environ.get("AEGIS_URL", "http://localhost:8000")
        self.base = url.rstrip("/") + "/api/v1/hitl/"
        self.patience = patience  # How long a call is tried again, in seconds.
        token = token or os.environ.get("AEGIS_TOKEN")
        tenant = tenant or os.environ.get("AEGIS_TENANT")
        self.who = {"Authorization": f"Bearer {token}"} if token else {"Tenant-Id": tenant or ""}

    def call(self, method, path, body=None, headers={}, timeout=10.0):
        """One call, tried again until it is answered. Each of them is safe to repeat: a submission
        by its key, a claim by its X-Request-Id, an outcome by its token."""
        data = None if body is None else json.dumps(body).encode()
        headers = {**self.who, "X-Request-Id": str(uuid.uuid4()), **headers}
        if data is not None:
            headers["Content-Type"] = "application/json"
        give_up, pause = time.monotonic() + self.patience, 0.2
        while True:
            request = urllib.request.Request(self.base + path, data, headers, method=method)
            try:
                with urllib.request.urlopen(request, timeout=timeout) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                with error:
                    problem = self._problem(error)
                if error.code < 500 and error.code != 429:
                    raise Refused(error.code, problem) from None
                failure = Refused(error.code, problem)
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
            left = 50.0 if deadline is None else min(50.0, deadline - time.monotonic())
            prefer = {"Prefer": f"wait={max(0, int(left))}"}
            action = self.call("GET", f"status/{id}", headers=prefer, timeout=65.0)
            if action["status"] != "PENDING":
                return action
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"nobody has decided on {id} yet")

    def run_once(self, action, run, lease=60):
        """Claims an approved action and runs it: `run(payload, id)`. Returns the action as it is
        then, or as somebody else left it. What runs is the payload that the claim shows."""
        id = action["request_id"]
        try:
            claimed = self.call(
                "POST", f"actions/{id}/claim", {"digest": action["digest"], "lease": lease}
            )
        except Refused as refused:
            if refused.code in ("already-claimed", "not-approved"):
                return refused.problem["action"]
            raise
        token, shown = {"token": claimed["claim"]["token"]}, claimed["action"]
        done = threading.Event()

        def renew():
            while not done.wait(lease / 3):
                try:
                    self.call("POST", f"actions/{id}/renew", {**token, "lease": lease})
                except Exception as error:
                    print(f"aegis: the claim on {id} was not renewed: {error}", file=sys.stderr)
                    return

        threading.Thread(target=renew, daemon=True).start()
        try:
            # An edit by the reviewer is what was approved.
            result = run(shown.get("edited_payload") or shown.get("payload") or {}, id)
        except Exception as error:
            report = ("fail", {**token, "reason": f"{type(error).__name__}: {error}"[:4000]})
            failure = error
        else:
            report, failure = ("complete", {**token, "result": result}), None
        finally:
            done.set()
        ended = self.call("POST", f"actions/{id}/{report[0]}", report[1])
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
