package main

import (
	"context"
	"errors"
	"os"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	"go.uber.org/zap"
)

// users switches authentication on, looks at what a user of one prefix may do, and leaves the store
// without users again. It runs last and only where AUTH is set.
func users(ctx context.Context, client *clientv3.Client) error {
	if os.Getenv("AUTH") == "" {
		return nil
	}
	own := prefix + "own/"
	for _, make := range []func() error{
		func() error { _, err := client.RoleAdd(ctx, "go-writer"); return err },
		func() error {
			_, err := client.RoleGrantPermission(ctx, "go-writer", own, clientv3.GetPrefixRangeEnd(own),
				clientv3.PermissionType(clientv3.PermReadWrite))
			return err
		},
		func() error { _, err := client.UserAdd(ctx, "go-user", "pw"); return err },
		func() error { _, err := client.UserGrantRole(ctx, "go-user", "go-writer"); return err },
		func() error { _, err := client.UserAdd(ctx, "root", "secret"); return err },
		func() error { _, err := client.UserGrantRole(ctx, "root", "root"); return err },
		func() error { _, err := client.AuthEnable(ctx); return err },
	} {
		if err := make(); err != nil {
			return err
		}
	}
	root, err := dialAs("root", "secret")
	if err != nil {
		return err
	}
	defer root.Close()
	outcome := permitted(ctx, own)
	_, anonymous := client.Get(ctx, own)
	status, err := root.AuthStatus(ctx)
	if err != nil {
		return err
	}
	listed, err := root.UserList(ctx)
	if err != nil {
		return err
	}
	if _, err := root.AuthDisable(ctx); err != nil {
		return err
	}
	for _, drop := range []func() error{
		func() error { _, err := client.UserDelete(ctx, "go-user"); return err },
		func() error { _, err := client.UserDelete(ctx, "root"); return err },
		func() error { _, err := client.RoleDelete(ctx, "go-writer"); return err },
	} {
		if err := drop(); err != nil {
			return err
		}
	}
	after, err := client.Get(ctx, own, clientv3.WithPrefix())
	if err != nil {
		return err
	}
	return errors.Join(outcome,
		same("without a name", anonymous, rpctypes.ErrUserEmpty),
		same("enabled", status.Enabled, true),
		same("users", listed.Users, []string{"go-user", "root"}),
		same("keys after it", after.Count, 1),
	)
}

// permitted: the recipes work below the prefix of a role, and nothing works outside.
func permitted(ctx context.Context, own string) error {
	_, wrong := dialAs("go-user", "wrong")
	user, err := dialAs("go-user", "pw")
	if err != nil {
		return err
	}
	defer user.Close()
	watching, cancel := context.WithCancel(ctx)
	defer cancel()
	events := user.Watch(watching, own, clientv3.WithPrefix(), clientv3.WithCreatedNotify())
	if created := <-events; !created.Created {
		return errors.New("a permitted watch was not created")
	}
	session, err := concurrency.NewSession(user)
	if err != nil {
		return err
	}
	defer session.Close()
	mutex := concurrency.NewMutex(session, own+"mutex")
	if err := mutex.Lock(ctx); err != nil {
		return err
	}
	if _, err := user.Txn(ctx).If(mutex.IsOwner()).Then(clientv3.OpPut(own+"a", "1")).Commit(); err != nil {
		return err
	}
	if err := mutex.Unlock(ctx); err != nil {
		return err
	}
	if _, err := hear(events, 3); err != nil {
		return err
	}
	_, get := user.Get(ctx, prefix+"elsewhere")
	_, wide := user.Get(ctx, prefix, clientv3.WithPrefix())
	_, put := user.Put(ctx, prefix+"elsewhere", "")
	_, txn := user.Txn(ctx).Then(clientv3.OpPut(own+"a", "2"), clientv3.OpTxn(nil,
		[]clientv3.Op{clientv3.OpDelete(prefix + "elsewhere")}, nil)).Commit()
	_, admin := user.UserList(ctx)
	refused := <-user.Watch(watching, prefix+"elsewhere")
	held, err := user.Get(ctx, own+"a")
	if err != nil {
		return err
	}
	denied := rpctypes.ErrPermissionDenied
	// A watch is canceled with the printed status for its reason.
	reason := "rpc error: code = PermissionDenied desc = " + denied.Error()
	return errors.Join(
		same("a wrong password", wrong, rpctypes.ErrAuthFailed),
		same("read outside", get, denied), same("read of more", wide, denied),
		same("write outside", put, denied), same("nested deletion outside", txn, denied),
		same("administration", admin, denied), same("watch outside", refused.Err(), reason),
		same("value after a denied transaction", string(held.Kvs[0].Value), "1"),
	)
}

func dialAs(user, password string) (*clientv3.Client, error) {
	return clientv3.New(clientv3.Config{
		Endpoints: []string{os.Getenv("ENDPOINT")},
		Username:  user,
		Password:  password,
		Logger:    zap.NewNop(),
	})
}
