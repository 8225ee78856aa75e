package kube

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

const (
	// advertiseAddress is from a documentation range: endpoints refuse loopback addresses.
	advertiseAddress = "192.0.2.1"
	adminToken       = "kelson-test-admin"
	// compactionInterval is how often the apiserver compacts; a revision is gone after two rounds.
	compactionInterval = 5 * time.Second
	// eventTTL is the lease of Event objects.
	eventTTL = 10 * time.Second
	// patience bounds every wait for something that has to happen eventually.
	patience = 90 * time.Second
)

// member is one process of the store.
type member struct {
	name     string
	port     int
	peerPort int
	process  *process
	// client speaks to this member only.
	client *clientv3.Client
}

// world is one store of one or more members and one kube-apiserver on loopback.
type world struct {
	pki          *pki
	dir          string
	apiPort      int
	secondPort   int
	members      []*member
	apiserver    *process
	second       *process
	storeBinary  string
	apiserverBin string

	clients *kubernetes.Clientset
	dynamic *dynamic.DynamicClient
	config  *rest.Config
	etcd    *clientv3.Client
}

func newWorld(t *testing.T, members int) *world {
	t.Helper()
	dir := t.TempDir()
	ports := freePorts(t, 2+2*members)
	w := &world{
		pki: newPKI(t, dir), dir: dir, apiPort: ports[0], secondPort: ports[1],
		storeBinary:  binary(t, "KELSON_BIN", "../../target/release/kelson"),
		apiserverBin: binary(t, "KUBE_APISERVER_BIN", ""),
	}
	for i := range members {
		w.members = append(w.members, &member{
			name: fmt.Sprintf("kube-test-%d", i), port: ports[2+2*i], peerPort: ports[3+2*i],
		})
	}
	t.Cleanup(func() { w.stop(t) })
	for _, m := range w.members {
		must(t, w.startMember(m), "start "+m.name)
	}
	for _, m := range w.members {
		m.client = w.connect(t, m.url())
	}
	w.etcd = w.connect(t, w.storeURLs()...)
	w.waitStore(t)
	w.startAPIServer(t)
	w.config = w.configFor(w.apiPort)
	var err error
	w.clients, err = kubernetes.NewForConfig(w.config)
	must(t, err, "make the typed client")
	w.dynamic, err = dynamic.NewForConfig(w.config)
	must(t, err, "make the dynamic client")
	w.waitAPIServer(t)
	return w
}

func (w *world) connect(t *testing.T, endpoints ...string) *clientv3.Client {
	t.Helper()
	client, err := clientv3.New(clientv3.Config{
		Endpoints: endpoints, TLS: w.pki.clientTLS(t, true),
		DialTimeout: 10 * time.Second, Logger: zap.NewNop(),
	})
	must(t, err, "connect to the store")
	t.Cleanup(func() { client.Close() })
	return client
}

func (w *world) configFor(port int) *rest.Config {
	return &rest.Config{
		Host:            fmt.Sprintf("https://127.0.0.1:%d", port),
		BearerToken:     adminToken,
		TLSClientConfig: rest.TLSClientConfig{CAFile: w.pki.caFile},
		QPS:             -1, // no client-side throttling
		Timeout:         60 * time.Second,
	}
}

// binary finds a program under test; one that is missing is a failure, never a skip.
func binary(t *testing.T, variable, fallback string) string {
	t.Helper()
	path := os.Getenv(variable)
	if path == "" {
		path = fallback
	}
	if path == "" {
		t.Fatalf("%s is not set: run this through `cargo xtask kube`", variable)
	}
	absolute, err := filepath.Abs(path)
	must(t, err, "resolve "+path)
	if _, err := os.Stat(absolute); err != nil {
		t.Fatalf("%s: %v", variable, err)
	}
	return absolute
}

func (m *member) url() string     { return fmt.Sprintf("https://127.0.0.1:%d", m.port) }
func (m *member) peerURL() string { return fmt.Sprintf("http://127.0.0.1:%d", m.peerPort) }

func (w *world) storeURLs() []string {
	var urls []string
	for _, m := range w.members {
		urls = append(urls, m.url())
	}
	return urls
}

// startMember starts a member, again if it ran before. Any goroutine may call it.
func (w *world) startMember(m *member) (err error) {
	var cluster []string
	for _, other := range w.members {
		cluster = append(cluster, other.name+"="+other.peerURL())
	}
	m.process, err = launch(filepath.Join(w.dir, m.name+".log"), w.storeBinary,
		"--name="+m.name,
		"--data-dir="+filepath.Join(w.dir, m.name),
		"--listen-client-urls="+m.url(),
		"--advertise-client-urls="+m.url(),
		"--listen-peer-urls="+m.peerURL(),
		"--initial-advertise-peer-urls="+m.peerURL(),
		"--initial-cluster="+strings.Join(cluster, ","),
		"--cert-file="+w.pki.storeServer.certFile,
		"--key-file="+w.pki.storeServer.keyFile,
		"--trusted-ca-file="+w.pki.caFile,
		"--client-cert-auth=true",
		"--watch-progress-notify-interval=5s",
	)
	return err
}

func (w *world) waitStore(t *testing.T) {
	t.Helper()
	eventually(t, "the store answers", func(ctx context.Context) error {
		for _, m := range w.members {
			if !m.process.running() {
				t.Fatalf("%s ended; its log ends with:\n%s", m.name, m.process.logTail())
			}
		}
		_, err := w.etcd.Get(ctx, "/registry/health")
		return err
	})
}

func (w *world) startAPIServer(t *testing.T) {
	t.Helper()
	w.apiserver = w.launchAPIServer(t, "apiserver.log", w.apiPort, advertiseAddress)
}

func (w *world) launchAPIServer(t *testing.T, log string, port int, address string) *process {
	t.Helper()
	tokens := filepath.Join(w.dir, "tokens.csv")
	line := adminToken + ",admin,admin-uid,system:masters\n"
	must(t, os.WriteFile(tokens, []byte(line), 0o600), "write the token file")
	return start(t, filepath.Join(w.dir, log), w.apiserverBin,
		"--etcd-servers="+strings.Join(w.storeURLs(), ","),
		"--etcd-cafile="+w.pki.caFile,
		"--etcd-certfile="+w.pki.storeClient.certFile,
		"--etcd-keyfile="+w.pki.storeClient.keyFile,
		"--etcd-compaction-interval="+compactionInterval.String(),
		"--event-ttl="+eventTTL.String(),
		"--bind-address=127.0.0.1",
		fmt.Sprintf("--secure-port=%d", port),
		"--advertise-address="+address,
		"--tls-cert-file="+w.pki.apiserver.certFile,
		"--tls-private-key-file="+w.pki.apiserver.keyFile,
		"--token-auth-file="+tokens,
		"--authorization-mode=RBAC",
		"--disable-admission-plugins=ServiceAccount",
		"--service-account-issuer=https://kubernetes.default.svc",
		"--service-account-key-file="+w.pki.serviceAccount,
		"--service-account-signing-key-file="+w.pki.serviceAccount,
		"--service-cluster-ip-range=10.96.0.0/24",
	)
}

// waitAPIServer waits for /readyz, which covers the store, all post-start hooks and informers.
func (w *world) waitAPIServer(t *testing.T) {
	t.Helper()
	w.waitReady(t, w.apiserver, w.apiPort)
}

func (w *world) waitReady(t *testing.T, server *process, port int) {
	t.Helper()
	roots := w.pki.clientTLS(t, false).RootCAs
	client := &http.Client{
		Timeout:   5 * time.Second,
		Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}},
	}
	eventually(t, "kube-apiserver is ready", func(ctx context.Context) error {
		if !server.running() {
			t.Fatalf("kube-apiserver ended; its log ends with:\n%s", server.logTail())
		}
		request, err := http.NewRequestWithContext(ctx, "GET", fmt.Sprintf("https://127.0.0.1:%d/readyz", port), nil)
		if err != nil {
			return err
		}
		response, err := client.Do(request)
		if err != nil {
			return err
		}
		defer response.Body.Close()
		if response.StatusCode != http.StatusOK {
			return fmt.Errorf("/readyz says %s", response.Status)
		}
		return nil
	})
}

func (w *world) stop(t *testing.T) {
	processes := []*process{w.second, w.apiserver}
	for _, m := range w.members {
		processes = append(processes, m.process)
	}
	for _, p := range processes {
		if p != nil {
			p.kill()
			if t.Failed() {
				t.Logf("log of %s ends with:\n%s", filepath.Base(p.program), p.logTail())
			}
		}
	}
}

// process is a child whose output goes to a file.
type process struct {
	program string
	logPath string
	command *exec.Cmd
	done    chan struct{}
}

func start(t *testing.T, logPath, program string, args ...string) *process {
	t.Helper()
	p, err := launch(logPath, program, args...)
	must(t, err, "start "+program)
	return p
}

func launch(logPath, program string, args ...string) (*process, error) {
	logFile, err := os.OpenFile(logPath, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer logFile.Close()
	command := exec.Command(program, args...)
	command.Stdout, command.Stderr = logFile, logFile
	// The child must not outlive a test that is killed.
	command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := command.Start(); err != nil {
		return nil, err
	}
	p := &process{program: program, logPath: logPath, command: command, done: make(chan struct{})}
	go func() {
		_ = command.Wait()
		close(p.done)
	}()
	return p, nil
}

func (p *process) running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// kill is the hard way out: no chance to flush or to say goodbye.
func (p *process) kill() {
	_ = p.command.Process.Kill()
	<-p.done
}

// terminate asks politely and fails the test if that does not end the process.
func (p *process) terminate(t *testing.T) {
	t.Helper()
	must(t, p.end(), "end "+p.program)
}

func (p *process) end() error {
	if err := p.command.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	select {
	case <-p.done:
		return nil
	case <-time.After(patience):
		return fmt.Errorf("it runs on %v after SIGTERM", patience)
	}
}

func (p *process) logTail() string {
	text, err := os.ReadFile(p.logPath)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimRight(string(text), "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-40):], "\n")
}

// eventually repeats check until it succeeds or patience ends.
func eventually(t *testing.T, what string, check func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var last error
	for {
		attempt, cancelAttempt := context.WithTimeout(ctx, 10*time.Second)
		err := check(attempt)
		cancelAttempt()
		if err == nil {
			return
		}
		if ctx.Err() == nil {
			last = err
		}
		select {
		case <-ctx.Done():
			t.Fatalf("%s: not within %v; last: %v", what, patience, last)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func freePorts(t *testing.T, count int) []int {
	t.Helper()
	var ports []int
	var held []net.Listener
	for range count {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		must(t, err, "find a free port")
		held = append(held, listener)
		ports = append(ports, listener.Addr().(*net.TCPAddr).Port)
	}
	for _, listener := range held {
		listener.Close()
	}
	return ports
}
