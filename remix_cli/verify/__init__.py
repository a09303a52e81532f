"""`remix verify-estimator`: is the router's gradient what it claims to be?

testbed.py   a tiny decoder whose selections can be prescribed, and what one pass over it leaves behind
exact.py     bias, by enumerating every pair of joint selections
variance.py  variance relative to `paper`, by sampling
verify_tables.py  what is printed
"""
