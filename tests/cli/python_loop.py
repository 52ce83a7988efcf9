"""An agent that exits at its n-th line: python_loop.py EXAMPLES LEDGER KEY N"""

import json, os, sys

examples, ledger, key, steps = sys.argv[1:]
sys.path.insert(0, examples)
import aegis_loop

left = int(steps)


def trace(frame, event, _):
    global left
    if frame.f_code.co_filename != aegis_loop.__file__:
        return None
    if event == "line":
        left -= 1
        if left == 0:
            os._exit(99)
    return trace


def effect(payload, _):
    row = os.open(ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(row, f"{key} {payload['amount']}\n".encode())
    os.close(row)
    return {"done": payload["amount"]}


aegis = aegis_loop.Aegis(patience=20)
if left > 0:
    sys.settrace(trace)
action = aegis.submit(key, {"amount": 12.5}, title="pay")
action = aegis.wait(action["request_id"])
if action["decision"] == "approve":
    action = aegis.run_once(action, effect, lease=1)
sys.settrace(None)
print(json.dumps(action))
