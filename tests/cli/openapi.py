"""Takes actions through every endpoint and holds each answer to the document."""

import json
import os
import re
import uuid
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

URL = os.environ["AEGIS_TEST_URL"]
KEY = os.environ["AEGIS_TEST_KEY"]
PREFIX = "/api/v1/hitl"
DOCUMENT = json.load(urlopen(URL + "/openapi.json", timeout=30))
WHO = {"Authorization": "Bearer " + KEY} if KEY else {"Tenant-Id": "acme"}
SEEN = set()


def described(method, path):
    path = path.split("?")[0]
    # A path without parameters goes first.
    for template in sorted(DOCUMENT["paths"], key=lambda path: path.count("{")):
        if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", template), path):
            if method.lower() in DOCUMENT["paths"][template]:
                return DOCUMENT["paths"][template][method.lower()]
    raise AssertionError(f"{method} {path} is not described")


def call(status, method, path, body=None, who=WHO, **more):
    headers = dict(who) | {name.replace("_", "-"): value for name, value in more.items()}
    data = None
    if body is not None:
        data = json.dumps(body).encode()
        headers["Content-Type"] = "application/json"
    request = Request(URL + path, data=data, headers=headers, method=method)
    try:
        answer = urlopen(request, timeout=30)
    except HTTPError as error:
        answer = error
    with answer:
        is_stream = answer.headers["Content-Type"] == "text/event-stream"
        text = b"" if is_stream else answer.read()
        assert answer.status == status, (method, path, answer.status, text)
        operation = described(method, path)
        response = operation["responses"][str(status)]
        media_type = answer.headers["Content-Type"].split(";")[0]
        schema = response["content"][media_type]["schema"]
        SEEN.add((operation["operationId"], status))
        for name in ["Location", "Idempotency-Replayed", "Retry-After", "WWW-Authenticate",
                     "Allow", "Preference-Applied", "X-Request-Id"]:
            assert answer.headers[name] is None or name in response["headers"], (path, name)
        if not media_type.endswith("json"):
            if is_stream:
                for line in answer:
                    if line.startswith(b"data: "):
                        check({"$ref": "#/components/schemas/Event"}, json.loads(line[6:]))
                        break
            return None
        found = json.loads(text)
        check(schema, found)
        return found


def check(schema, found):
    whole = dict(schema, components=DOCUMENT["components"])
    Draft202012Validator(whole).validate(found)


def submit(**aegis):
    key = str(uuid.uuid4())
    by_key = {"Thread_Id": "h", "Idempotency_Key": key, "X_Request_Id": key}
    body = {"amount": 5, "aegis": {"title": "Pay", **aegis}}
    action = call(201, "POST", f"{PREFIX}/actions", body, **by_key)
    call(200, "POST", f"{PREFIX}/actions", body, **by_key)
    call(422, "POST", f"{PREFIX}/actions", {"amount": 6}, **by_key)
    return f"{PREFIX}/actions/{action['request_id']}", {"digest": action["digest"]}, by_key


def decide(**more):
    # On a server with keys the submitter may not decide, so those are decided unsubmitted.
    key = str(uuid.uuid4())
    by_key = {"Thread_Id": "h", "Idempotency_Key": key, "X_Request_Id": key}
    action = call(202, "POST", f"{PREFIX}/approve", {"amount": 5}, **by_key)
    call(202, "POST", f"{PREFIX}/approve", {"amount": 5}, **by_key)
    call(409, "POST", f"{PREFIX}/approve", {"amount": 5}, **dict(by_key, X_Request_Id="o"))
    call(422, "POST", f"{PREFIX}/reject", {"amount": 5}, **by_key)
    return f"{PREFIX}/actions/{action['request_id']}", {"digest": action["digest"]}


OpenAPIV31SpecValidator(DOCUMENT).validate()
assert DOCUMENT["openapi"].startswith("3.1"), DOCUMENT["openapi"]

for path in ["/livez", "/readyz", "/openapi.json", "/docs"]:
    call(200, "GET", path, who={})

by_key = {"Thread_Id": "h", "Idempotency_Key": "r"}
call(202, "POST", f"{PREFIX}/reject", **by_key)
call(400, "POST", f"{PREFIX}/reject", {"aegis": 1}, **by_key)
call(415, "POST", f"{PREFIX}/reject", [1], **dict(by_key, Content_Encoding="gzip"))
call(413, "POST", f"{PREFIX}/reject", {"x": "x" * 300_000}, **by_key)
call(401, "POST", f"{PREFIX}/reject", who={"Authorization": "Basic x"}, **by_key)

path, seen, _ = submit()
call(200, "GET", path)
call(200, "GET", path.replace("/actions/", "/status/"), who={})
call(200, "GET", path.replace("/actions/", "/status/"), Prefer="wait=0")
call(404, "GET", f"{PREFIX}/actions/{uuid.uuid4()}")
call(200, "GET", f"{PREFIX}/actions?status=PENDING&limit=1")
call(400, "GET", f"{PREFIX}/actions?limit=0")
if KEY:
    call(403, "POST", f"{path}/approve", seen)
    call(403, "POST", f"{path}/reject", seen)
    call(401, "GET", path, who={})
else:
    call(400, "POST", f"{path}/approve", {})
    call(202, "POST", f"{path}/approve", seen)
    call(202, "POST", f"{submit()[0]}/reject", seen)
    call(421, "GET", path, Host="other.example")
path, _, _ = submit()
call(202, "POST", f"{path}/cancel", {})
call(409, "POST", f"{path}/cancel", {})

path, seen = decide()
claimed = call(200, "POST", f"{path}/claim", seen, X_Request_Id="claim-1")
call(200, "POST", f"{path}/claim", seen, X_Request_Id="claim-1")
call(409, "POST", f"{path}/claim", seen)
token = {"token": claimed["claim"]["token"]}
call(200, "POST", f"{path}/renew", token)
call(422, "POST", f"{path}/renew", {"token": "x"})
call(200, "POST", f"{path}/complete", dict(token, result=[1]))
call(200, "POST", f"{path}/complete", dict(token, result=[1]))
call(200, "GET", path)
path, seen = decide()
token = {"token": call(200, "POST", f"{path}/claim", seen)["claim"]["token"]}
call(200, "POST", f"{path}/fail", dict(token, reason="r"))
call(422, "POST", f"{path}/claim", seen)
call(200, "GET", path)
call(200, "GET", f"{PREFIX}/events", Last_Event_ID="0")
call(400, "GET", f"{PREFIX}/events", Last_Event_ID="x")

answered = {name for name, status in SEEN if status < 300}
missing = {
    operation["operationId"]
    for item in DOCUMENT["paths"].values()
    for operation in item.values()
} - answered
assert missing == ({"approve-by-id", "reject-by-id"} if KEY else set()), missing
print("all is well")
