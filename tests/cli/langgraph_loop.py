"""The LangGraph node, with both checkpointers: langgraph.py EXAMPLES DATABASE"""

import json, os, sqlite3, sys, threading, time, urllib.request
from typing import TypedDict

sys.path.insert(0, sys.argv[1])
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command

import langgraph_node
from aegis_loop import Aegis

ledger = []


class State(TypedDict, total=False):
    amount: float
    charge: str


def graph(saver):
    def run(payload, id):
        ledger.append((id, payload["amount"]))
        return {"charged": payload["amount"]}

    builder = StateGraph(State)
    node = langgraph_node.approved_node("charge", lambda state: {"amount": state["amount"]}, run)
    builder.add_node("approve_charge", node)
    builder.add_edge(START, "approve_charge")
    builder.add_edge("approve_charge", END)
    return builder.compile(checkpointer=saver)


def decide(id, verb, **more):
    reviewer = Aegis()
    action = reviewer.call("GET", f"actions/{id}")
    return reviewer.call("POST", f"actions/{id}/{verb}", {"digest": action["digest"], **more})


def check(make_saver, name):
    config = {"configurable": {"thread_id": f"{name}-1"}}
    state = graph(make_saver()).invoke({"amount": 12.5}, config)
    asked = state["__interrupt__"][0].value["request_id"]
    # Resumed before anyone has decided: it stops again, and asks about the same action.
    state = graph(make_saver()).invoke(Command(resume="approved, honestly"), config)
    assert state["__interrupt__"][0].value["request_id"] == asked, state
    assert ledger == [], ledger
    decide(asked, "approve")
    state = graph(make_saver()).invoke(Command(resume=True), config)
    assert state["charge"] == "completed", state
    assert ledger == [(asked, 12.5)], ledger
    # The whole graph again, as after a crash before its last checkpoint.
    state = graph(InMemorySaver()).invoke({"amount": 12.5}, config)
    assert state["charge"] == "completed", state
    assert len(ledger) == 1, ledger
    ledger.clear()

    config = {"configurable": {"thread_id": f"{name}-2"}}
    state = graph(make_saver()).invoke({"amount": 1}, config)
    decide(state["__interrupt__"][0].value["request_id"], "reject", comment="no")
    state = graph(make_saver()).invoke(Command(resume=True), config)
    assert state["charge"] == "rejected" and ledger == [], (state, ledger)

    # Several runs of one thread at once: one of them runs the action.
    config = {"configurable": {"thread_id": f"{name}-3"}}
    state = graph(InMemorySaver()).invoke({"amount": 7}, config)
    decide(state["__interrupt__"][0].value["request_id"], "approve")
    runs = [
        threading.Thread(target=lambda: graph(InMemorySaver()).invoke({"amount": 7}, config))
        for _ in range(8)
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert len(ledger) == 1, ledger
    ledger.clear()


memory = InMemorySaver()
check(lambda: memory, "memory")
# A connection of its own each time, as in a process of its own.
check(lambda: SqliteSaver(sqlite3.connect(sys.argv[2], check_same_thread=False)), "sqlite")
print("all is well")
