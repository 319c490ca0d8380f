"""Search: plans for a budget, found by measured loss. (Not `search`: a module of that name would hide the function.)"""
