"""Routing: hidden states -> expert ids and weights -> dispatch plan -> groups -> combine.

`strategies` choose experts, `plan` cuts their choice into one piece per group and adds the answers up,
`dispatch` sends the pieces and waits. None of them knows what a group's other end is.
"""
