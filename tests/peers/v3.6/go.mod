module kelson.example/tests/peers/v3.6

go 1.26.0
