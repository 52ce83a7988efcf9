"""A LangGraph node that asks a person, stops, resumes, and runs its action once.

A node runs again from its top when its graph is resumed, so everything before `interrupt` happens
more than once. The key of the action is therefore derived, never made up: it is the same at each
run, and so is the action. The claim lets one run of the node through.
"""

from langgraph.types import interrupt

from aegis_loop import Aegis

aegis = Aegis()


def approved_node(name, payload_of, run):
    """Makes a node that runs `run(payload, id)` once a person has approved it.

    `payload_of(state)` is what the person sees. The key is derived from the graph's thread and
    `name`, so a thread runs the node's action once; for a node that loops, put the number of the
    round into `name`.
    """

    def node(state, config):
        thread = config["configurable"]["thread_id"]
        action = aegis.submit(f"{thread}:{name}", payload_of(state), thread=thread, title=name)
        while action["status"] == "PENDING":
            # Whoever resumes the graph says nothing that counts: the server knows the decision.
            interrupt({"request_id": action["request_id"], "title": name})
            action = aegis.call("GET", f"status/{action['request_id']}")
        if action["decision"] == "approve" and action["execution"] is None:
            action = aegis.run_once(action, run)
        return {name: outcome(action)}

    return node


def outcome(action):
    """What became of an action, in a word that a graph can branch on."""
    if action["closed"]:
        return action["closed"]  # "expired" or "cancelled": nobody decided.
    if action["decision"] == "reject":
        return "rejected"
    return action["execution"]  # "completed", "failed", "unknown", or "claimed" by another run.
