"""The published Python SDK, as it is, against a server: one with the tenant header trusted, one with API keys."""

import asyncio
import os
import uuid
from importlib.metadata import version

from aegis_hitl import AegisClient

URL = os.environ["SDK_URL"]
KEYS_URL = os.environ["SDK_KEYS_URL"]
API_KEY = os.environ["SDK_API_KEY"]


def check(what, response, expected, /, **members):
    body = response.json()
    action = body.get("action", body)
    shown = {name: action.get(name) for name in members}
    print(f"{what}: {response.status_code} {body.get('code', '')} {shown}")
    assert response.status_code == expected, (what, response.status_code, body)
    assert shown == members, (what, shown, members)
    return body


async def decide_and_ask(client):
    key = str(uuid.uuid4())
    body = check(
        "approve", await client.approve(key, payload={"to": "a@b.c", "amount": 10.0}), 202,
        status="COMMITTED", decision="approve", execution=None, idempotency_key=key, replayed=False,
    )
    request_id = body["request_id"]
    check("get_status", await client.get_status(request_id), 200,
          request_id=request_id, status="COMMITTED", decision="approve")
    again = check("approve again", await client.approve(key, payload={"amount": 10, "to": "a@b.c"}), 409,
                  request_id=request_id, decision="approve")
    assert again["code"] == "duplicate"
    conflict = check("reject what is approved", await client.reject(key), 422,
                     request_id=request_id, decision="approve")
    assert conflict["code"] == "decision-conflict"
    mismatch = check("another payload", await client.approve(key, payload={"to": "a@b.c", "amount": 11}), 422,
                     request_id=request_id, decision="approve")
    assert mismatch["code"] == "payload-mismatch"

    key = str(uuid.uuid4())
    check("reject", await client.reject(key), 202, status="COMMITTED", decision="reject")
    check("execute approve", await client.execute("approve", str(uuid.uuid4())), 202, decision="approve")
    check("execute reject", await client.execute("reject", str(uuid.uuid4())), 202, decision="reject")
    check("execute reject again", await client.execute("reject", key), 409, decision="reject")
    check("get_status of nothing", await client.get_status(str(uuid.uuid4())), 404)
    check("another thread", await client.approve(key, thread_id="thread-2"), 202,
          thread_id="thread-2", decision="approve")


async def main():
    print(f"aegis-idempotency {version('aegis-idempotency')}")
    async with AegisClient(URL, tenant_id="acme", thread_id="thread-1") as client:
        await decide_and_ask(client)
        check("another tenant", await client.approve("k", tenant_id="other"), 202, tenant_id="other")
        # As the SDK's own tests do it: identity in the body too, where it is opaque.
        body = {"tenant_id": "not-this", "thread_id": "nor-this"}
        check("identity in the body", await client.approve("k", payload=body), 202,
              tenant_id="acme", thread_id="thread-1")

        calls = [client.approve(f"concurrent-{number % 100}") for number in range(200)]
        statuses = [response.status_code for response in await asyncio.gather(*calls)]
        accepted, duplicates = statuses.count(202), statuses.count(409)
        print(f"200 approvals at once on 100 keys: {accepted} accepted, {duplicates} duplicates")
        assert (accepted, duplicates) == (100, 100), statuses
        calls = [client.approve(f"own-{number}") for number in range(200)]
        statuses = [response.status_code for response in await asyncio.gather(*calls)]
        print(f"200 approvals at once on 200 keys: {statuses.count(202)} accepted")
        assert statuses == [202] * 200, statuses

    async with AegisClient(KEYS_URL, api_key=API_KEY, thread_id="thread-1") as client:
        print("with an API key:")
        await decide_and_ask(client)
        check("the key names the tenant", await client.approve("k"), 202, tenant_id="keyed")
    async with AegisClient(KEYS_URL, api_key="sk_live_unknown", thread_id="thread-1") as client:
        check("unknown API key", await client.approve("k2"), 401)
    async with AegisClient(KEYS_URL, tenant_id="keyed", thread_id="thread-1") as client:
        check("no API key", await client.approve("k2"), 401)
    print("all is well")


asyncio.run(main())
